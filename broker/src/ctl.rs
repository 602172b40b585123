//! Commands for the running broker itself: `ctl reload`, `ctl status`.

use anyhow::{Context, bail};
use clap::Subcommand;
use serde::{Deserialize, Serialize};
use wasmqtt_host::Cancel;
use wasmqtt_server::{Inspector, Status};

use crate::control::{Answer, Request, ask};
use crate::operate::Which;
use crate::reload::{Report, Running};

#[derive(Debug, Subcommand)]
pub(crate) enum CtlCommand {
    /// Have the configuration read again, as SIGHUP does, and say what came of it.
    #[command(after_help = "\
Limits, who may connect without a plugin, the log level, listeners and settings of plugins change while clients stay
connected; what CONNACK says holds for clients that connect afterwards. Everything else is named as needing a restart. If there is anything
wrong with the file nothing changes, and the exit status is 1.

Examples:
  wasmqtt ctl reload
  wasmqtt ctl reload --config /etc/wasmqtt.toml --json")]
    Reload {
        #[command(flatten)]
        which: Which,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Show what the broker has to do, as SIGUSR1 has it logged.
    #[command(after_help = "Example:\n  wasmqtt ctl status --json")]
    Status {
        #[command(flatten)]
        which: Which,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
}

/// The same on its way to the broker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CtlRequest {
    Reload,
    Status,
}

/// In the broker.
pub(crate) fn answer(
    request: &CtlRequest,
    running: &Running,
    server: &Inspector,
    cancel: &Cancel,
) -> anyhow::Result<Answer> {
    Ok(Answer::Ctl(match request {
        CtlRequest::Reload => serde_json::to_value(running.reload(cancel)?)?,
        CtlRequest::Status => serde_json::to_value(server.status())?,
    }))
}

/// In the command.
pub(crate) fn run(command: CtlCommand) -> anyhow::Result<String> {
    match command {
        CtlCommand::Reload { which, json } => {
            let answer = asked(&which, CtlRequest::Reload)?;
            if json {
                return crate::output::json(&answer);
            }
            let report: Report = serde_json::from_value(answer).context("read the broker's answer")?;
            Ok(report.text())
        }
        CtlCommand::Status { which, json } => {
            let answer = asked(&which, CtlRequest::Status)?;
            if json {
                return crate::output::json(&answer);
            }
            let status: Status = serde_json::from_value(answer).context("read the broker's answer")?;
            Ok(format!("{status}\n"))
        }
    }
}

fn asked(which: &Which, request: CtlRequest) -> anyhow::Result<serde_json::Value> {
    let Answer::Ctl(answer) = ask(&which.data_dir()?, &Request::Ctl(request), &[])? else {
        bail!("an unexpected answer")
    };
    Ok(answer)
}
