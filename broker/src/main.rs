//! The `wasmqtt` binary: command line, configuration, and the wiring of server and plugin host.
#![forbid(unsafe_code)]

mod authoring; // `plugin new`, `check`, `test`, `bench`
mod control; // commands to a running broker
mod ctl; // `ctl reload`, `status`
mod feed; // `plugin feed`
mod log; // one line per event on standard error, which holds up nobody
mod operate; // `plugin list`, `deploy`, `rollback`, `promote`, `explain`
mod output; // what commands print
mod passwd; // entries for password files
mod plugins; // settings → plugin host
mod reload; // other settings for a running broker
mod serve; // from settings to a running broker and back
mod settings; // the configuration file, and what it means
mod stores; // `store stats`, `check`, `compact`, `export`, `import`, `backup`
mod supervise; // ends the broker when one of its threads has ended

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use wasmqtt_host::CompileLimits;

use crate::authoring::{Kind, Language, Subject};
use crate::ctl::CtlCommand;
use crate::feed::FeedCommand;
use crate::operate::{Access, Which};
use crate::output::print;
use crate::reload::Origin;
use crate::settings::Listen;
use crate::stores::StoreCommand;

// Each shard allocates and frees small things all day; this allocator keeps a heap per thread for that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// An MQTT broker that is extended with WebAssembly components.
#[derive(Debug, Parser)]
#[command(
    name = "wasmqtt",
    version,
    after_help = "\
Examples:
  wasmqtt serve                                   on 127.0.0.1:1883, for this machine
  wasmqtt serve --config /etc/wasmqtt.toml
  wasmqtt config check /etc/wasmqtt.toml
  wasmqtt ctl reload --config /etc/wasmqtt.toml
  wasmqtt passwd /etc/wasmqtt/passwords ann       asks for the password
  wasmqtt plugin inspect plugins/auth-file.wasm"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the broker until SIGTERM or SIGINT.
    #[command(after_help = "\
Prints one line per listener when it is ready, such as `listening on mqtt://127.0.0.1:1883`; the log goes to standard
error. SIGTERM and SIGINT end it in good order, a second one at once. SIGHUP has the configuration read again, as
`wasmqtt ctl reload` does; SIGUSR1 has figures logged.

Examples:
  wasmqtt serve
  wasmqtt serve --config wasmqtt.toml
  wasmqtt serve --listen 127.0.0.1:0 --listen unix:/run/wasmqtt.sock")]
    Serve(ServeArgs),
    /// Check or show a configuration file.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Add, replace or delete an entry of a password file.
    #[command(after_help = "\
The password is asked for twice, or taken from the first line of standard input when that is not a terminal.

--import takes over the users of a password file of mosquitto ($7$, $6$, $argon2id$) or of htpasswd -B (bcrypt); those who
have an entry already keep it. What was taken and what was refused is said line by line, and the exit status is 0 if
nothing was refused.

Examples:
  wasmqtt passwd etc/passwords ann
  printf '%s\\n' \"$PASSWORD\" | wasmqtt passwd etc/passwords ann
  wasmqtt passwd --delete etc/passwords ann
  wasmqtt passwd --import /etc/mosquitto/passwd etc/passwords")]
    Passwd(PasswdArgs),
    /// Look at plugins.
    #[command(subcommand)]
    Plugin(PluginCommand),
    /// Look at what the broker has kept, check it, copy it.
    #[command(subcommand)]
    Store(StoreCommand),
    /// Tell a running broker to do something.
    #[command(subcommand)]
    Ctl(CtlCommand),
    /// What the broker starts itself as to compile one component, from standard input to standard output.
    #[command(hide = true, name = wasmqtt_host::COMPILE_SUBCOMMAND)]
    CompileComponent(CompileArgs),
}

/// In the order in which [`wasmqtt_host::Compiler`] gives them.
#[derive(Debug, Args)]
struct CompileArgs {
    memory_mib: u32,
    cpu_secs: u32,
    compiled_mib: u32,
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Configuration file; without it, the defaults apply.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Listen here instead of what the configuration says: `host:port`, or `unix:/path`. May be repeated.
    #[arg(short, long, value_name = "ADDR", value_parser = settings::parse_listen)]
    listen: Vec<Listen>,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Say what is wrong with a configuration file; the exit status is 0 if nothing is.
    Check {
        /// The file.
        file: PathBuf,
    },
    /// Print what a configuration file means, defaults included.
    Show {
        /// The file.
        file: PathBuf,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
struct PasswdArgs {
    /// The password file; made if it is not there, readable by its owner only.
    file: PathBuf,
    /// User name.
    #[arg(required_unless_present = "import")]
    user: Option<String>,
    /// Delete the entry.
    #[arg(long, requires = "user")]
    delete: bool,
    /// Take over the users of another broker's password file.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["user", "delete", "memory_kib", "iterations"])]
    import: Option<PathBuf>,
    /// Memory one check takes; more makes guessing dearer, and needs room in the plugin's memory limit.
    #[arg(long, value_name = "KIB", default_value_t = argon2::Params::DEFAULT_M_COST,
        value_parser = clap::value_parser!(u32).range(8..=4_194_304))]
    memory_kib: u32,
    /// Passes over that memory.
    #[arg(long, value_name = "N", default_value_t = argon2::Params::DEFAULT_T_COST,
        value_parser = clap::value_parser!(u32).range(1..=100))]
    iterations: u32,
}

#[derive(Debug, Subcommand)]
enum PluginCommand {
    /// Show what a component exports and imports, and which plug-points of the broker it fills.
    Inspect {
        /// The component.
        file: PathBuf,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Make a project for a plugin, which builds and passes its own tests at once.
    #[command(after_help = "\
Examples:
  wasmqtt plugin new my-acl --lang rust --kind acl
  wasmqtt plugin new meter --kind events --path plugins/meter")]
    New {
        /// Name of the plugin and its folder: small letters, digits and `-`.
        name: String,
        /// Language.
        #[arg(long, value_enum, default_value = "rust")]
        lang: Language,
        /// What it is for.
        #[arg(long, value_enum)]
        kind: Kind,
        /// Folder, if it is not to be called like the plugin.
        #[arg(long, value_name = "DIR")]
        path: Option<PathBuf>,
    },
    /// Load a component as the broker would, and show what it needs.
    #[command(after_help = "\
What the component prints and logs meanwhile goes to standard error.

Examples:
  wasmqtt plugin check acl.wasm
  wasmqtt plugin check auth.wasm --set password=secret --json
  wasmqtt plugin check zig.wasm --limit memory_mib=32")]
    Check {
        #[command(flatten)]
        subject: Subject,
        /// A setting; may be repeated.
        #[arg(long, value_name = "NAME=VALUE", value_parser = authoring::parse_pair)]
        set: Vec<(String, String)>,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Run calls from a file against a component, without a broker.
    #[command(after_help = "\
A case has a name, a call (authenticate, authorize, before-store or observed), what goes in, and in `expect` what must
come back; `plugin new` makes an example.

Example:
  wasmqtt plugin test acl.wasm cases.toml")]
    Test {
        #[command(flatten)]
        subject: Subject,
        /// The cases.
        cases: PathBuf,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Measure what a component costs.
    #[command(after_help = "\
A function of which a call fails gets the reason instead of figures, and the exit status is then 1.

Examples:
  wasmqtt plugin bench acl.wasm
  wasmqtt plugin bench python.wasm --limit memory_mib=64")]
    Bench {
        #[command(flatten)]
        subject: Subject,
        /// A setting; may be repeated.
        #[arg(long, value_name = "NAME=VALUE", value_parser = authoring::parse_pair)]
        set: Vec<(String, String)>,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Show the plugins of a running broker.
    #[command(after_help = "\
Examples:
  wasmqtt plugin list
  wasmqtt plugin list --config /etc/wasmqtt.toml --json")]
    List {
        #[command(flatten)]
        which: Which,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Replace plugins of a running broker, all in one step or none.
    #[command(after_help = "\
A component is for the plugin whose name is that of its file; `acl_rules.wasm` is for `acl-rules`.

Examples:
  wasmqtt plugin deploy target/wasm32-wasip2/release/acl.wasm
  wasmqtt plugin deploy --name acl build/new.wasm
  wasmqtt plugin deploy --config /etc/wasmqtt.toml auth.wasm acl.wasm

Compiling a large component takes a while; `wasmqtt plugin list` shows it, and an interrupt (Ctrl-C) gives it up. A
running build that exports `handover` is asked for what it knows, and if it fails to say, nothing is deployed; with
--fresh it is not asked.")]
    Deploy {
        #[command(flatten)]
        which: Which,
        /// Name of the plugin, if the file has another one.
        #[arg(long)]
        name: Option<String>,
        /// Do not ask the running builds for what they know; the new ones begin without it.
        #[arg(long)]
        fresh: bool,
        /// Components.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Let an earlier version of a plugin serve again, or drop the one on trial.
    #[command(after_help = "\
Examples:
  wasmqtt plugin rollback acl                     the version before
  wasmqtt plugin rollback acl --to 3f9a2c         one of those that `plugin list` shows")]
    Rollback {
        #[command(flatten)]
        which: Which,
        /// Name of the plugin.
        name: String,
        /// Beginning of the version.
        #[arg(long, value_name = "VERSION")]
        to: Option<String>,
    },
    /// Let the version on trial, a canary or a shadow, serve everybody.
    #[command(after_help = "Example:\n  wasmqtt plugin promote acl")]
    Promote {
        #[command(flatten)]
        which: Which,
        /// Name of the plugin.
        name: String,
    },
    /// Show who would decide what about an access, and why.
    #[command(after_help = "\
Examples:
  wasmqtt plugin explain --client sensor-7 --publish plant/7/temperature
  wasmqtt plugin explain --client ann --principal ann --subscribe 'plant/#' --json")]
    Explain {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        access: Access,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Look at messages that a plugin has not taken; skip them or have them tried again.
    #[command(subcommand)]
    Feed(FeedCommand),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::print_error(&error);
            // Service managers tell a broker that broke from one that was set up wrong.
            error.downcast_ref::<supervise::Died>().map_or(ExitCode::FAILURE, |_| ExitCode::from(supervise::EXIT))
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => {
            let origin = Origin { file: args.config, listen: args.listen };
            serve::run(origin)
        }
        Command::Config(ConfigCommand::Check { file }) => {
            settings::check(&file)?;
            print(&format!("{}: ok\n", file.display()))
        }
        Command::Config(ConfigCommand::Show { file, json }) => {
            let settings = settings::load(&file, &[])?;
            let shown = settings.shown();
            print(&if json { output::json(&shown)? } else { toml::to_string(&shown).context("write TOML")? })
        }
        Command::Passwd(PasswdArgs { file, user, delete, import, memory_kib, iterations }) => match (import, user) {
            (Some(from), _) => passwd::import(&from, &file),
            (None, Some(user)) if delete => passwd::delete(&file, &user),
            (None, user) => passwd::set(&file, &user.unwrap_or_default(), passwd::Cost { memory_kib, iterations }),
        },
        Command::Plugin(command) => print(&run_plugin(command)?),
        Command::Store(command) => print(&stores::run(command)?),
        Command::Ctl(command) => print(&ctl::run(command)?),
        Command::CompileComponent(CompileArgs { memory_mib, cpu_secs, compiled_mib }) => {
            Ok(wasmqtt_host::compile_child(CompileLimits { memory_mib, cpu_secs, compiled_mib })?)
        }
    }
}

fn run_plugin(command: PluginCommand) -> anyhow::Result<String> {
    match command {
        PluginCommand::Inspect { file, json } => plugins::inspect(&file, json),
        PluginCommand::New { name, lang, kind, path } => authoring::new(&name, lang, kind, path.as_deref()),
        PluginCommand::Check { subject, set, json } => authoring::check(&subject, &set, json),
        PluginCommand::Test { subject, cases, json } => {
            let (text, ok) = authoring::test(&subject, &cases, json)?;
            if !ok {
                print(&text)?;
                anyhow::bail!("some cases failed");
            }
            Ok(text)
        }
        PluginCommand::Bench { subject, set, json } => {
            let (text, ok) = authoring::bench(&subject, &set, json)?;
            if !ok {
                print(&text)?;
                anyhow::bail!("some calls failed");
            }
            Ok(text)
        }
        PluginCommand::List { which, json } => operate::list(&which, json),
        PluginCommand::Deploy { which, name, fresh, files } => operate::deploy(&which, name.as_deref(), fresh, &files),
        PluginCommand::Rollback { which, name, to } => operate::roll_back(&which, &name, to.as_deref()),
        PluginCommand::Promote { which, name } => operate::promote(&which, &name),
        PluginCommand::Explain { which, access, json } => operate::explain(&which, &access, json),
        PluginCommand::Feed(command) => feed::run(command),
    }
}
