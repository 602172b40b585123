//! Commands for the store: `store stats`, `check`, `compact`, `export`, `import`, `backup`.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, IsTerminal, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use wasmqtt_store::Offline;

use crate::control::{Answer, Request, ask};
use crate::settings::{self, Settings};

/// Which store.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Configuration file of the broker; without it, the defaults apply.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StoreCommand {
    /// Count what is in it. The broker must not run.
    Stats {
        #[command(flatten)]
        which: Which,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Read every row; the exit status is 0 if all are good. The broker must not run.
    Check {
        #[command(flatten)]
        which: Which,
        /// Delete damaged rows.
        #[arg(long)]
        repair: bool,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Give the place of what was deleted back. The broker must not run.
    Compact {
        #[command(flatten)]
        which: Which,
    },
    /// Write everything as lines of JSON, to a file or to standard output. The broker must not run.
    Export {
        #[command(flatten)]
        which: Which,
        /// The file.
        file: Option<PathBuf>,
    },
    /// Make a new store of what `export` wrote. The broker must not run.
    Import {
        #[command(flatten)]
        which: Which,
        /// The file.
        file: PathBuf,
    },
    /// Copy it to a new folder, while the broker runs or while it does not.
    #[command(after_help = "\
To go back: stop the broker, put the folder in the place of its store, and start it.

Example:
  wasmqtt store backup --config /etc/wasmqtt.toml /backup/2026-11-28")]
    Backup {
        #[command(flatten)]
        which: Which,
        /// The folder; must not exist.
        dir: PathBuf,
    },
}

impl Which {
    fn settings(&self) -> anyhow::Result<Settings> {
        Ok(match &self.config {
            Some(file) => settings::load(file, &[])?,
            None => settings::defaults(&[])?,
        })
    }

    fn path(&self) -> anyhow::Result<PathBuf> {
        match self.settings()?.store {
            Some(store) => Ok(store.path),
            None => bail!("[store] durability = \"memory\": there is no store"),
        }
    }

    fn open(&self) -> anyhow::Result<Offline> {
        Ok(Offline::open(&self.path()?)?)
    }
}

/// Says what is being worked on, to people.
fn progress(what: &str) {
    if io::stderr().is_terminal() {
        eprintln!("{what} …");
    }
}

/// What the command prints.
pub(crate) fn run(command: StoreCommand) -> anyhow::Result<String> {
    match command {
        StoreCommand::Stats { which, json } => stats(&which.open()?, json),
        StoreCommand::Check { which, repair, json } => check(&which.open()?, repair, json),
        StoreCommand::Compact { which } => {
            which.open()?.compact(progress)?;
            Ok("compacted\n".into())
        }
        StoreCommand::Export { which, file } => export(&which.open()?, file.as_deref()),
        StoreCommand::Import { which, file } => {
            let mut from = BufReader::new(File::open(&file).with_context(|| format!("read {}", file.display()))?);
            let rows = Offline::create(&which.path()?)?.import(&mut from)?;
            Ok(format!("{rows} rows\n"))
        }
        StoreCommand::Backup { which, dir } => backup(&which, &dir),
    }
}

fn stats(store: &Offline, json: bool) -> anyhow::Result<String> {
    let stats = store.stats(progress)?;
    if json {
        return crate::output::json(&stats);
    }
    let mut text = format!("{:<14}{:>12}{:>16}{:>16}\n", "FAMILY", "ROWS", "BYTES", "ON DISK");
    for family in stats {
        let _ = writeln!(text, "{:<14}{:>12}{:>16}{:>16}", family.family, family.rows, family.bytes, family.disk_bytes);
    }
    Ok(text)
}

fn check(store: &Offline, repair: bool, json: bool) -> anyhow::Result<String> {
    let damage = store.check(repair, progress)?;
    let mut text = String::new();
    if json {
        text = crate::output::json(&damage)?;
    } else {
        for row in &damage {
            let _ = writeln!(text, "{}: {}: {}", row.family, row.key, row.why);
        }
    }
    if damage.is_empty() || repair {
        let _ = write!(
            text,
            "{}",
            if json {
                ""
            } else if repair {
                "repaired\n"
            } else {
                "ok\n"
            }
        );
        return Ok(text);
    }
    crate::print(&text)?;
    bail!("{} rows are damaged; `--repair` deletes them", damage.len())
}

fn export(store: &Offline, file: Option<&Path>) -> anyhow::Result<String> {
    let Some(file) = file else {
        store.export(&mut BufWriter::new(io::stdout().lock()))?;
        return Ok(String::new());
    };
    let wrote = || format!("write {}", file.display());
    // Payloads are in it.
    let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).with_context(wrote)?;
    let mut to = BufWriter::new(new);
    let rows = store.export(&mut to)?;
    to.flush().with_context(wrote)?;
    to.get_ref().sync_all().and_then(|()| wasmqtt_files::sync_parent(file)).with_context(wrote)?;
    Ok(format!("{rows} rows\n"))
}

/// The broker does it, if it runs.
fn backup(which: &Which, dir: &Path) -> anyhow::Result<String> {
    let dir = std::path::absolute(dir).context("find the folder")?;
    let data_dir = which.settings()?.data_dir;
    match ask(&data_dir, &Request::Backup { dir: dir.clone() }, &[]) {
        Ok(Answer::Done) => {}
        Ok(_) => bail!("an unexpected answer"),
        Err(error) if error.to_string().starts_with("no broker runs") => which.open()?.backup(&dir)?,
        Err(error) => return Err(error),
    }
    Ok(format!("copied to {}\n", dir.display()))
}
