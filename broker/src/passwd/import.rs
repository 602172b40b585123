//! `wasmqtt passwd --import`: entries of another broker's password file, as far as `auth-file` can check them.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, bail};
use wasmqtt_passwords::Hash;

use super::{check_user, rewrite};

/// How an import went, line by line.
#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    lines: String,
    taken: usize,
    kept: usize,
    refused: usize,
}

/// Appends the entries of `from` whose users are not in `file` yet, and says what became of each.
pub(crate) fn import(from: &Path, file: &Path) -> anyhow::Result<()> {
    let text = std::fs::read(from).with_context(|| format!("read {}", from.display()))?;
    let mut report = Report::default();
    rewrite(file, true, |old| {
        let (new, told) = merged(old, &text);
        report = told;
        (report.taken > 0).then_some(new)
    })?;
    let Report { lines, taken, kept, refused } = report;
    eprint!("{lines}");
    eprintln!("{}: {taken} taken into {}, {kept} there already, {refused} refused", from.display(), file.display());
    if refused > 0 {
        bail!("{refused} lines of {} were refused", from.display());
    }
    Ok(())
}

/// The file with the new entries at its end.
fn merged(old: &str, other: &[u8]) -> (String, Report) {
    let name = |line: &str| line.split_once(':').map(|(name, _)| name.to_owned());
    let mut known: HashSet<String> = old.lines().filter(|line| !line.starts_with('#')).filter_map(name).collect();
    let mut new = old.to_owned();
    if !new.is_empty() && !new.ends_with('\n') {
        new.push('\n');
    }
    let mut report = Report::default();
    for (at, line) in other.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii_end();
        if line.trim_ascii().is_empty() || line.starts_with(b"#") {
            continue;
        }
        let told = match entry(line) {
            Err(why) => {
                report.refused += 1;
                format!("refused: {why}")
            }
            Ok((user, _, _)) if known.contains(user) => {
                report.kept += 1;
                format!("{user} is there already, and stays as it is")
            }
            Ok((user, hash, kind)) => {
                known.insert(user.to_owned());
                report.taken += 1;
                let _ = writeln!(new, "{user}:{hash}");
                format!("{user} taken, {kind}")
            }
        };
        let _ = writeln!(report.lines, "line {}: {told}", at + 1);
    }
    (new, report)
}

/// User, hash, and what kind of hash it is.
fn entry(line: &[u8]) -> Result<(&str, &str, &'static str), String> {
    let line = std::str::from_utf8(line).map_err(|_| "it is not UTF-8".to_owned())?;
    let (user, hash) = line.split_once(':').ok_or("there is no colon in it")?;
    check_user(user).map_err(|error| error.to_string())?;
    Ok((user, hash, Hash::parse(hash)?.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PBKDF2: &str = "$7$101$05dZjo3mzDhz6tOY$w+1EGs+bjOxkMISPxerliH93uDyq4M6V+QruAUZGaONje8unXks179Eoos5H+yNylwPCg37y/yO1Q/fj6YAIAg==";
    const SHA512: &str =
        "$6$ZW6YXY9QBS1b/9bR$dNb7x6RGxO+O08MiNqHat9NIKpGY2tJE630zRGf0svOlQfF1IKTzJIWVQMnUNAbVcfumr/h7Rol+W2kFWwZ2XA==";
    const BCRYPT: &str = "$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a";

    #[test]
    fn entries_are_added_and_those_that_are_there_stay() {
        let other = format!("# theirs\r\nann:{PBKDF2}\r\n\nbob:{SHA512}\ncarl:{BCRYPT}\nbob:{PBKDF2}\n");
        let (new, report) = merged("# ours\nann:old", other.as_bytes());
        assert_eq!(new, format!("# ours\nann:old\nbob:{SHA512}\ncarl:{BCRYPT}\n"));
        assert_eq!((report.taken, report.kept, report.refused), (2, 2, 0));
        assert_eq!(
            report.lines,
            "line 2: ann is there already, and stays as it is\nline 4: bob taken, SHA-512, which is quick to guess\n\
             line 5: carl taken, bcrypt\nline 6: bob is there already, and stays as it is\n"
        );
    }

    #[test]
    fn what_cannot_be_checked_is_refused_with_its_line() {
        for (line, why) in [
            ("ann:plain", "the password is not hashed"),
            ("ann", "there is no colon"),
            (":$6$a$b", "user name \"\" cannot be an entry"),
            ("ann:$1$abc$def", "\"1\" is not a hash that can be checked"),
            ("ann:$6$AAAA$AAAA", "its hash has 3 bytes instead of 64"),
            ("ann:$7$0$AAAA$AAAA", "not a $7$ hash"),
            // Characters of bcrypt's base64, with bits in the last one that no byte has: `auth-file` refuses the file.
            ("ann:$2b$05$abcdefghijklmnopqrstuvOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a", "not a bcrypt hash"),
            ("ann:$2b$05$01234567890123456789012345678901234567890123456789012", "not a bcrypt hash"),
            ("ann:$2b$99$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a", "not a bcrypt hash"),
            ("ann:$argon2id$x", "not an Argon2id hash"),
        ] {
            let (new, report) = merged("", format!("bob:{BCRYPT}\n{line}").as_bytes());
            assert_eq!((report.taken, report.refused), (1, 1), "{line}");
            assert!(report.lines.contains("line 2: refused: ") && report.lines.contains(why), "{}", report.lines);
            assert!(!new.contains(line), "{new}");
        }
        assert!(merged("", b"\xFF:x").1.lines.contains("it is not UTF-8"));
    }
}
