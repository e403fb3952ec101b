#!/bin/sh
# Checks a folder of delivered batches against the digests beside them: every hash, the chain of the digests, and what
# is there without being listed. Needs sh, awk, sha256sum and the usual tools of POSIX. It changes nothing; its notes
# are in a folder of its own under $TMPDIR, or /tmp, and go when it ends.
#
#   sh verify.sh FOLDER      ends 0 when all is well, 1 when there is a finding, 2 when it can't look
#
# The findings: changed, missing, extra, incomplete, chain broken. The last lines tell the newest digest and its hash,
# to be compared with the one in the sender's hourly mail.
set -u
LC_ALL=C CDPATH=
export LC_ALL
cd -- "${1:?usage: sh verify.sh FOLDER}" || exit 2
notes=${TMPDIR:-/tmp}/verify-$$
umask 077
mkdir -- "$notes" || exit 2
trap 'rm -rf -- "$notes"' EXIT
trap 'exit 2' HUP INT TERM

# 1. The plain files that are named as ours are, one a line: letters, digits, and no sign that a shell minds.
hour='[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]'
for name in *_$hour*.sha256 *_${hour}_*.log *_${hour}_*.log.gz; do
  case $name in [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) continue ;; esac
  [ -f "$name" ] && [ ! -L "$name" ] && printf '%s\n' "$name"
done >"$notes/names"

# 2. A digest's last line has the hash of the lines above it. So it is copied without its last line, and whole: when
# that copy has another hash than the digest itself, it is no text.
awk -v notes="$notes/" '/[.]sha256$/ {
  whole = $0 ".whole"; above = $0 ".above"
  printf "" >(notes whole); printf "" >(notes above)
  for (n = 0; (getline line < $0) > 0; last = line) {
    print line >(notes whole)
    if (n++) print last >(notes above)
  }
  close($0); close(notes whole); close(notes above)
  print whole; print above
}' "$notes/names" >"$notes/copies" || exit 2
if [ ! -s "$notes/copies" ]; then
  printf 'no digest is in %s: nothing says what has to be there\n' "$1" >&2
  exit 1
fi

# 3. The hash of everything: `<sha256>  <name>`.
{ xargs sha256sum -- <"$notes/names" && (cd -- "$notes" && xargs sha256sum -- <copies); } >"$notes/hashes" || exit 2

# 4. The digests are read, and what they say is compared.
awk '
  function is_digest(name) { return name ~ DIGEST && part_of(name) != 0 }
  function is_batch(name) { return name ~ BATCH && part_of(name) != 0 && is_window(window_of(name)) }
  function hour_of(name) { return substr(window_of(name), 1, 8) }
  function window_of(name) { match(name, WINDOW); return substr(name, RSTART + 1, 14) }
  function part_of(name) {
    sub(/[.](sha256|log|log[.]gz)$/, "", name)
    if (!sub(/^.*[.]/, "", name)) return "1"
    return name == "1" || length(name) > 15 ? "0" : name
  }
  # `yyMMddHH_mm-mm`: one that no clock shows is none of ours.
  function is_window(w,   month, day, first, minutes, days) {
    month = substr(w, 3, 2) + 0; day = substr(w, 5, 2) + 0; first = substr(w, 10, 2) + 0
    minutes = substr(w, 13, 2) - first + 1
    days = month == 2 ? 28 + (substr(w, 1, 2) % 4 == 0) : 30 + (month + (month > 7)) % 2
    return month >= 1 && month <= 12 && day >= 1 && day <= days && substr(w, 7, 2) + 0 < 24 &&
      minutes >= 1 && 60 % minutes == 0 && first % minutes == 0 && first < 60
  }
  function found(kind, name) { findings[kind ": " name] = 1 }

  # Reads a digest into line[1..n]; gives whether it is as it was written, and no other one under its name.
  function is_whole(name,   hour, part, plain) {
    hour = "# hour " hour_of(name); part = part_of(name)
    if (part != "1") hour = hour ", part " part ": what came after the digest before"
    plain = 1
    for (n = 0; (getline line[n + 1] < name) > 0; n++) if (line[n + 1] ~ /[^ -~]/) plain = 0
    close(name)
    return plain && n > 2 && hash[name] == hash[name ".whole"] && line[2] == hour &&
      line[n] == "# end " hash[name ".above"]
  }
  function read_digest(name,   i, file, previous, begun, yes) {
    if (hour_of(name) > newest) newest = hour_of(name)
    if (!is_whole(name)) { found("changed", name); damaged[hour_of(name)] = 1; return }
    good[name] = 1
    for (i = 1; i < n; i++) {
      if (line[i] == "# complete yes") yes = 1
      if (!begun && line[i] ~ /^# begins /) { begun = 1; begins[++chains] = substr(line[i], 10) }
      if (substr(line[i], 65, 2) != "  " || substr(line[i], 1, 64) !~ /^[0-9a-f]+$/) continue
      file = substr(line[i], 67)
      listed[file] = 1
      if (is_digest(file)) { previous++; followers[file]++ }
      if (!(file in hash)) found("missing", file)
      else if (hash[file] != substr(line[i], 1, 64)) found("changed", file)
    }
    if (previous != (begun ? 0 : 1)) found("chain broken", name)
    i = name; sub(/([.][0-9]+)?[.]sha256$/, "", i) # the newest of an hour counts
    if (part_of(name) + 0 > last[i] + 0) { last[i] = part_of(name); complete[i] = yes }
  }

  function put_in_order(list, n,   i, j, one) { # few: a process more would take longer
    for (i = 2; i <= n; i++) {
      one = list[i]
      for (j = i - 1; j > 0 && list[j] > one; j--) list[j + 1] = list[j]
      list[j + 1] = one
    }
  }

  BEGIN {
    d = "[0-9]"; hour = "_" d d d d d d d d; part = "([.][1-9][0-9]*)?"
    DIGEST = "^[A-Za-z0-9][A-Za-z0-9_-]*" hour part "[.]sha256$"
    WINDOW = hour "(_" d d "-" d d "_[a-z0-9-]+)?" part "[.](sha256|log|log[.]gz)$"
    BATCH = "^[A-Za-z0-9][A-Za-z0-9_-]*" hour "_" d d "-" d d "_[a-z0-9-]+" part "[.]log([.]gz)?$"
  }
  { name = substr($0, 67) }
  is_digest(name) || is_batch(name) || name ~ /[.](whole|above)$/ { hash[name] = substr($0, 1, 64) }
  END {
    for (name in hash) if (is_digest(name)) read_digest(name)
    for (name in followers) if (followers[name] > 1) found("chain broken", name)
    for (name in good) if (!(name in followers)) head[++heads] = name
    for (any in damaged) isDamaged = 1
    if (!isDamaged && heads > chains) for (i = 1; i <= heads; i++) found("chain broken", head[i])
    for (name in hash) {
      if (!is_batch(name) || name in listed) continue
      if (hour_of(name) > newest) uncovered++
      else if (!(hour_of(name) in damaged)) found("extra", name)
    }
    for (name in last) if (!complete[name]) found("incomplete", substr(name, length(name) - 7))
    for (text in findings) { count++; print text | "sort" }
    if (count) close("sort")
    put_in_order(begins, chains); put_in_order(head, heads)
    for (i = 1; i <= chains; i++) print "begins: " begins[i]
    if (uncovered) print "not covered yet: " uncovered " batches behind the newest digest"
    for (i = 1; i <= heads; i++) print "head: " hash[head[i]] "  " head[i]
    print (count ? count (count == 1 ? " finding" : " findings") : "ok")
    exit (count > 0)
  }' "$notes/hashes"
