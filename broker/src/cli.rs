//! The command line.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

use crate::config::Meant;
use crate::{config, passwd, serve};

/// The MQTT broker you extend with WebAssembly.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  wasmqtt serve                                   serve on 127.0.0.1:1883
  wasmqtt serve --config wasmqtt.toml             as configured
  wasmqtt serve --listen 127.0.0.1:0              on a free port, printed when ready
  wasmqtt config check wasmqtt.toml               say what is wrong with a configuration
  wasmqtt passwd etc/passwords alice              add a user, asking for the password
  wasmqtt plugin inspect plugins/auth-file.wasm   what a plugin exports and imports";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the broker until SIGTERM or SIGINT.
    Serve(ServeArgs),
    /// Check or show a configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Add, change or remove a user in a password file.
    Passwd(passwd::PasswdArgs),
    /// Look at plugins.
    #[command(subcommand)]
    Plugin(PluginCommand),
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  wasmqtt serve --config wasmqtt.toml\n  wasmqtt serve --listen 127.0.0.1:1884 --listen unix:/run/wasmqtt.sock")]
pub(crate) struct ServeArgs {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Listen here instead of where the configuration says: HOST:PORT or unix:PATH. May be repeated.
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Exit status 0 if the broker would start with it.
    Check {
        /// Configuration file.
        file: PathBuf,
    },
    /// Print every value in force.
    Show {
        /// Configuration file.
        file: PathBuf,
        /// As JSON instead of TOML.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum PluginCommand {
    /// Print size, plug-points, exports and imports of a component.
    Inspect {
        /// Component.
        file: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

impl Cli {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Serve(args) => serve::serve(&args),
            Command::Config(ConfigCommand::Check { file }) => {
                Meant::load(&file)?;
                println!("{}: good", file.display());
                Ok(())
            }
            Command::Config(ConfigCommand::Show { file, json }) => {
                let text = config::show(&config::read(&file)?, json)?;
                println!("{text}");
                Ok(())
            }
            Command::Passwd(args) => passwd::run(&args),
            Command::Plugin(PluginCommand::Inspect { file, json }) => inspect(&file, json),
        }
    }
}

fn inspect(file: &std::path::Path, json: bool) -> anyhow::Result<()> {
    let inspection = wasmqtt_host::inspect(file).with_context(|| format!("inspect {}", file.display()))?;
    if json {
        println!("{}", serde_json::to_string_pretty(&inspection)?);
        return Ok(());
    }
    println!("{}: {} bytes", file.display(), inspection.size);
    for (title, names) in [
        ("plug-points", &inspection.plug_points),
        ("exports", &inspection.exports),
        ("imports", &inspection.imports),
    ] {
        println!("{title}:");
        for name in names {
            println!("  {name}");
        }
    }
    Ok(())
}
