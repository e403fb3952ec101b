#!/bin/sh
# Checks a folder of delivered batches against the digests beside them: every hash, the chain of the digests, and what
# is there without being listed. Needs sh, awk, sha256sum and the usual tools of POSIX; changes nothing.
#
#   sh verify.sh FOLDER      ends 0 when all is well, 1 when there is a finding, 2 when it can't look
#
# The findings: changed, missing, extra, incomplete, chain broken. The last lines tell the newest digest and its hash,
# to be compared with the one in the sender's hourly mail.
set -u
LC_ALL=C
export LC_ALL
cd -- "${1:?usage: sh verify.sh FOLDER}" || exit 2
d='[0-9]'
digest="^[A-Za-z0-9][A-Za-z0-9_-]*_$d$d$d$d$d$d$d$d([.][1-9]$d*)?[.]sha256\$"
batch="^[A-Za-z0-9][A-Za-z0-9_-]*_$d$d$d$d$d$d$d${d}_$d$d-$d${d}_[a-z0-9-]+([.][1-9]$d*)?[.]log([.]gz)?\$"

# The plain files of a kind, one a line.
files() {
  ls -A | grep -E -- "$1" | grep -vE '[.]1[.](sha256|log|log[.]gz)$' | while IFS= read -r name; do
    [ -f "$name" ] && [ ! -L "$name" ] && printf '%s\n' "$name"
  done
}

{
  { files "$digest"; files "$batch"; } | xargs sha256sum -- /dev/null | sed 's/^\([0-9a-f]*\)  /H \1 /'
  files "$digest" | while IFS= read -r name; do
    sum=$(sed '$d' "$name" | sha256sum | cut -c 1-64)
    says="# hour $(printf '%s\n' "$name" |
      sed -e 's/[.]sha256$//' -e 's/^.*_//' -e 's/[.]\(.*\)/, part \1: what came after the digest before/')"
    if [ "$(tail -n 1 "$name" | sha256sum)" = "$(printf '# end %s\n' "$sum" | sha256sum)" ] &&
      [ "$(sed -n 2p "$name")" = "$says" ]; then # else damaged, or another one under its name
      printf 'D %s\n' "$name"
      sed '$d' "$name" | sed 's/^/L /'
    else
      printf 'B %s\n' "$name"
    fi
  done
} | awk '
  function is_digest(name) { return name ~ /[.]sha256$/ }
  function digest_hour(name) { sub(/([.][1-9][0-9]*)?[.]sha256$/, "", name); return substr(name, length(name) - 7) }
  function digest_part(name) {
    if (name !~ /[.][1-9][0-9]*[.]sha256$/) return 1
    sub(/[.]sha256$/, "", name); sub(/^.*[.]/, "", name); return name + 0
  }
  function batch_window(name) { match(name, /_[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]_[0-9][0-9]-[0-9][0-9]_[a-z0-9-]+([.][0-9]+)?[.]log([.]gz)?$/); return substr(name, RSTART + 1, 14) }
  # A window that no clock shows is none of ours.
  function number(text, at) { return substr(text, at, 2) + 0 } # not compared as text, where "05" is less than 1
  function is_batch(name,   w, n, month, day, days) {
    w = batch_window(name); month = number(w, 3); day = number(w, 5); n = number(w, 13) - number(w, 10) + 1
    days = month == 2 ? 28 + (number(w, 1) % 4 == 0) : 30 + (substr(w, 3, 2) ~ /01|03|05|07|08|10|12/)
    return n >= 1 && 60 % n == 0 && number(w, 10) % n == 0 && number(w, 13) < 60 && number(w, 7) < 24 &&
      day >= 1 && day <= days && month >= 1 && month <= 12
  }
  function add(kind, name) { found[kind ": " name] = 1 }
  function leave() {
    if (current == "") return
    if (previous != (began ? 0 : 1)) add("chain broken", current)
    current = ""
  }
  function enter(name, hour) {
    leave()
    hour = digest_hour(name)
    if (hour > newest) newest = hour
    return hour
  }
  $1 == "H" && $3 != "/dev/null" && (is_digest($3) || is_batch($3)) { hash[$3] = $2 }
  $1 == "B" { damaged[enter($2)] = 1; damage = 1; add("changed", $2) }
  $1 == "D" {
    hour = enter($2); current = $2; previous = 0; began = 0; good[$2] = 1
    part = digest_part($2); counts = part > last[hour] + 0
    if (counts) { last[hour] = part; complete[hour] = 0 }
  }
  $1 == "L" {
    line = substr($0, 3)
    if (line == "# complete yes" && counts) complete[hour] = 1
    if (substr(line, 1, 9) == "# begins " && !began) { began = 1; begins[++chains] = substr(line, 10) }
    if (substr(line, 65, 2) != "  " || substr(line, 1, 64) !~ /^[0-9a-f]+$/) next
    sum = substr(line, 1, 64); name = substr(line, 67)
    listed[name] = 1
    if (is_digest(name)) { previous++; followers[name]++ }
    if (!(name in hash)) add("missing", name)
    else if (hash[name] != sum) add("changed", name)
  }
  END {
    leave()
    for (name in followers) if (followers[name] > 1) add("chain broken", name)
    for (name in good) if (!(name in followers)) { heads++; head[name] = 1 }
    if (!damage && heads > chains) for (name in head) add("chain broken", name)
    for (name in hash) {
      if (is_digest(name) || name in listed) continue
      hour = substr(batch_window(name), 1, 8)
      if (hour > newest) uncovered++
      else if (!(hour in damaged)) add("extra", name)
    }
    for (hour in last) if (!complete[hour]) add("incomplete", hour)
    sorted = "sort"
    for (text in found) { findings++; print text | sorted }
    close(sorted)
    for (i = 1; i <= chains; i++) print "begins: " begins[i] | sorted
    close(sorted)
    if (uncovered) print "not covered yet: " uncovered " batches behind the newest digest"
    sorted = "sort -k 3"
    for (name in head) print "head: " hash[name] "  " name | sorted
    close(sorted)
    if (findings) print findings " findings"
    else print "ok"
    exit (findings > 0)
  }'
