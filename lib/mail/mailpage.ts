/**
 * What all mails share: the frame, colours, escaping. Tables and inline styles alone, for mail clients drop style
 * sheets, scripts and remote pictures. Everything that comes from outside goes through `escapeHtml`.
 */
import { hostname } from "node:os";
import { VERSION } from "../service.ts";

/** What a mail says. */
export interface MailText {
  subject: string;
  html: string;
  text: string;
}

/** Those of the status page: each keeps WCAG's 4.5:1, as text on white and under white text. */
export const COLOR = {
  good: "#116b3c",
  bad: "#b42318",
  warn: "#8a4b00",
  ink: "#1c2128",
  faint: "#57606a",
  line: "#e3e8ed",
};

/** For text in HTML, also in attributes. */
export function escapeHtml(text: string): string {
  const entities: Record<string, string> = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    '"': "&quot;",
    "'": "&#39;",
  };
  return text.replace(/[&<>"']/g, (c) => entities[c] ?? c);
}

/** The frame of every mail. `body` is HTML, title and subtitle are text. */
export function page(title: string, subtitle: string, color: string, body: string): string {
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light"><title>${escapeHtml(title)}</title></head>
<body style="margin:0;padding:0;background:#f2f5f7"><div role="main">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0" style="background:#f2f5f7"><tr><td align="center" style="padding:12px">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0" style="max-width:600px;table-layout:fixed;overflow-wrap:anywhere;background:#ffffff;font-family:Helvetica,Arial,sans-serif;font-size:14px;line-height:1.4;text-align:left">
<tr><td style="padding:14px;background:${color};color:#ffffff"><h1 style="margin:0;font-size:18px;line-height:1.4;font-weight:bold">${escapeHtml(title)}</h1>
<div style="font-size:13px">${escapeHtml(subtitle)}</div></td></tr>
<tr><td style="padding:0 0 10px">${body}</td></tr></table>
<div style="padding:10px;font-family:Helvetica,Arial,sans-serif;font-size:11px;color:${COLOR.faint}">${escapeHtml(footer())}</div>
</td></tr></table></div></body></html>
`;
}

/** A small heading. */
export function heading(text: string): string {
  return `<h2 style="margin:0;padding:12px 14px 6px;font-size:12px;font-weight:bold;color:${COLOR.faint}">${escapeHtml(text)}</h2>`;
}

/** Who writes. */
export function footer(): string {
  return `Log-RT-Sync ${VERSION} on ${hostname()}`;
}

/** With a capital letter. */
export function sentence(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** `06:12` of this machine's clock. */
export function formatClock(at: number): string {
  return new Date(at).toTimeString().slice(0, 5);
}

/** `2026-11-22 06:12` of this machine's clock. */
export function formatTime(at: number): string {
  const date = new Date(at);
  const two = (n: number) => String(n).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${formatClock(at)}`;
}
