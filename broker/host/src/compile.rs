//! Compiling a component, in a process of its own.
//!
//! What a compiler does with a hostile component is bounded by nothing but the machine, so the broker starts itself as
//! a compiler. The child limits itself before it reads anything: computing time, address space, bytes of the result.
//! It has no environment, no open files but the component, the result and a pipe for what it has to say; it runs at low
//! priority, ends with the broker, and can be killed at any time. The broker loads what it has written.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal};
use wasmqtt_protocol::text::escaped;
use wasmtime::Engine;

use crate::HostError;
use crate::engine;
use crate::instance::one_line;
use crate::source::COMPONENT_BYTES_MAX;

/// Between two looks whether the child has ended or should: short at first, since most components are small.
const LOOK_AFTER: Duration = Duration::from_millis(1);
const LOOK_AFTER_MAX: Duration = Duration::from_millis(20);
/// Bytes of what a compiler says that are kept, and of those that are shown.
const SAID_BYTES_MAX: u64 = 16 * 1024;
const SHOWN_BYTES_MAX: usize = 1000;
/// Priority of the child: clients are served first.
const NICE: i32 = 10;
/// Files that the child may have open.
const FILES_MAX: u64 = 32;
/// Seconds between the signal that ends a child and the one that cannot be caught.
const GRACE_SECS: u64 = 2;

/// Bounds of compiling one component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompileLimits {
    /// MiB of address space of the compiler; default 2,048.
    pub memory_mib: u32,
    /// Seconds of computing time; default 300.
    pub cpu_secs: u32,
    /// MiB of the compiled component; default 256.
    pub compiled_mib: u32,
}

impl Default for CompileLimits {
    fn default() -> Self {
        Self { memory_mib: 2048, cpu_secs: 300, compiled_mib: 256 }
    }
}

/// What compiles components.
#[derive(Debug, Clone)]
pub enum Compiler {
    /// A program that calls [`compile_child`] when it is started with these arguments, followed by three numbers: those
    /// of [`CompileLimits`].
    Process {
        /// The program.
        program: PathBuf,
        /// Its first arguments.
        args: Vec<OsString>,
    },
    /// The thread that asks, without any limit. For tests, whose programs have no such subcommand: a broker must not
    /// use it.
    InProcess,
}

/// Name of the subcommand that [`Compiler::default`] starts.
pub const COMPILE_SUBCOMMAND: &str = "compile-component";

impl Default for Compiler {
    /// The running program, with [`COMPILE_SUBCOMMAND`].
    fn default() -> Self {
        Self::this_program(COMPILE_SUBCOMMAND)
    }
}

impl Compiler {
    /// The running program, with a subcommand of this name.
    pub fn this_program(subcommand: &str) -> Self {
        // The file that runs, also after another one has got its name.
        let running = PathBuf::from("/proc/self/exe");
        let program = if running.exists() { running } else { std::env::current_exe().unwrap_or(running) };
        Self::Process { program, args: vec![subcommand.into()] }
    }

    /// Compiles `bytes`; files that it needs on the way lie in `dir`, without a name. `goes_on` is asked all the time,
    /// and ends it by saying no.
    pub(crate) fn compile(
        &self,
        engine: &Engine,
        bytes: &[u8],
        limits: CompileLimits,
        dir: &Path,
        goes_on: &mut dyn FnMut() -> bool,
    ) -> Result<Vec<u8>, HostError> {
        match self {
            Self::InProcess => precompiled(engine, bytes),
            Self::Process { program, args } => {
                let failed =
                    |error: std::io::Error| HostError::new(format!("cannot compile in {}: {error}", dir.display()));
                let mut component = nameless(dir).map_err(failed)?;
                component.write_all(bytes).and_then(|()| component.rewind()).map_err(failed)?;
                let mut result = nameless(dir).map_err(failed)?;
                let written = result.try_clone().map_err(failed)?;
                let mut child = start(program, args, limits, component, written)?;
                watch(&mut child, limits, goes_on)?;
                let mut compiled = Vec::new();
                result.rewind().and_then(|()| result.read_to_end(&mut compiled)).map_err(failed)?;
                Ok(compiled)
            }
        }
    }
}

fn precompiled(engine: &Engine, bytes: &[u8]) -> Result<Vec<u8>, HostError> {
    let failed = |error: wasmtime::Error| format!("not a component that can be used: {}", one_line(&error));
    engine.precompile_component(bytes).map_err(|error| HostError::new(failed(error)))
}

/// A file of ours that nobody else can open, and that is gone when it is closed.
fn nameless(dir: &Path) -> std::io::Result<File> {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = dir.join(format!(".compile-{}-{number}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

fn start(
    program: &Path,
    args: &[OsString],
    limits: CompileLimits,
    component: File,
    result: File,
) -> Result<Child, HostError> {
    let CompileLimits { memory_mib, cpu_secs, compiled_mib } = limits;
    let mut command = Command::new(program);
    command
        .arg0("wasmqtt")
        .args(args)
        .args([memory_mib, cpu_secs, compiled_mib].map(|limit| limit.to_string()))
        .env_clear()
        .current_dir("/")
        // A terminal's interrupt is for the broker, which ends its children itself.
        .process_group(0)
        .stdin(Stdio::from(component))
        .stdout(Stdio::from(result))
        .stderr(Stdio::piped());
    command.spawn().map_err(|error| HostError::new(format!("cannot start the compiler: {error}")))
}

/// Until it has ended, or is ended.
fn watch(child: &mut Child, limits: CompileLimits, goes_on: &mut dyn FnMut() -> bool) -> Result<(), HostError> {
    let said = child.stderr.take();
    let listen = move || {
        let mut text = Vec::new();
        if let Some(mut said) = said {
            let _ = (&mut said).take(SAID_BYTES_MAX).read_to_end(&mut text);
            // It must not wait for somebody to read the rest.
            let _ = std::io::copy(&mut said, &mut std::io::sink());
        }
        String::from_utf8_lossy(&text).into_owned()
    };
    let listener = std::thread::Builder::new().name("compiler-says".into()).spawn(listen);
    let mut pause = LOOK_AFTER;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if goes_on() => std::thread::sleep(pause),
            ended => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(match ended {
                    Err(error) => HostError::new(format!("cannot wait for the compiler: {error}")),
                    Ok(_) => HostError::new("compiling was cancelled"),
                });
            }
        }
        pause = (pause * 2).min(LOOK_AFTER_MAX);
    };
    if status.success() {
        return Ok(());
    }
    let said = listener.ok().and_then(|listener| listener.join().ok()).unwrap_or_default();
    Err(HostError::new(explained(status, &said, limits)))
}

/// Why there is no result, in terms of the settings where one of them is the reason.
fn explained(status: ExitStatus, said: &str, limits: CompileLimits) -> String {
    let CompileLimits { memory_mib, cpu_secs, compiled_mib } = limits;
    let text = said.trim();
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let lacks_memory = ["memory allocation of", "Cannot allocate memory", "os error 12", "out of memory"];
    if lacks_memory.iter().any(|sign| text.contains(sign)) {
        return format!("compiling it needs more memory than [plugins] compile_memory_mib = {memory_mib}");
    }
    let shown = escaped(text, SHOWN_BYTES_MAX);
    match status.signal() {
        Some(signal) if signal == Signal::XCPU.as_raw() => {
            format!("compiling it takes more computing time than [plugins] compile_cpu_secs = {cpu_secs}")
        }
        Some(signal) if signal == Signal::XFSZ.as_raw() => {
            format!("compiled, it has more bytes than [plugins] compiled_mib_max = {compiled_mib}")
        }
        Some(signal) if signal == Signal::KILL.as_raw() => {
            "the compiler was killed; perhaps the machine has too little memory for it".to_owned()
        }
        Some(signal) => format!("the compiler ended by signal {signal}: {shown}"),
        None if text.is_empty() => format!("the compiler ended with {status}"),
        None => shown.to_string(),
    }
}

/// What the child does: limits itself, compiles standard input, writes to standard output.
///
/// # Errors
/// The limits cannot be set, it is no component, or the result cannot be written. The text is for standard error.
pub fn compile_child(limits: CompileLimits) -> Result<(), HostError> {
    confine(limits).map_err(|error| HostError::new(format!("cannot limit the compiler: {error}")))?;
    let mut bytes = Vec::new();
    let failed = |error: std::io::Error| HostError::new(format!("cannot read the component: {error}"));
    std::io::stdin().lock().take(COMPONENT_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    let compiled = precompiled(&engine::engine(None)?, &bytes)?;
    let mut out = std::io::stdout().lock();
    out.write_all(&compiled)
        .and_then(|()| out.flush())
        .map_err(|error| HostError::new(format!("cannot write the compiled component: {error}")))
}

fn confine(limits: CompileLimits) -> std::io::Result<()> {
    // The broker may be killed, and then nobody wants the result.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let _ = rustix::thread::set_name(c"wasmqtt-compile");
    let _ = rustix::process::setpriority_process(None, NICE);
    let mib = |mib: u32| u64::from(mib) << 20;
    limit(Resource::Core, 0, 0)?;
    limit(Resource::Nofile, FILES_MAX, FILES_MAX)?;
    limit(Resource::Cpu, limits.cpu_secs.into(), u64::from(limits.cpu_secs) + GRACE_SECS)?;
    limit(Resource::Fsize, mib(limits.compiled_mib), mib(limits.compiled_mib))?;
    limit(Resource::As, mib(limits.memory_mib), mib(limits.memory_mib))
}

/// Sets a limit, or leaves a stricter one.
fn limit(resource: Resource, current: u64, maximum: u64) -> std::io::Result<()> {
    let known = rustix::process::getrlimit(resource).maximum.unwrap_or(u64::MAX);
    let new = Rlimit { current: Some(current.min(known)), maximum: Some(maximum.min(known)) };
    Ok(rustix::process::setrlimit(resource, new)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_said(raw: i32, said: &str, expected: &str) {
        let told = explained(ExitStatus::from_raw(raw), said, CompileLimits::default());
        assert!(told.contains(expected), "{told}");
    }

    #[test]
    fn a_limit_that_is_reached_is_named_as_the_setting() {
        check_said(6, "memory allocation of 48 bytes failed\n", "[plugins] compile_memory_mib = 2048");
        check_said(256, "error: mmap: Cannot allocate memory (os error 12)", "[plugins] compile_memory_mib = 2048");
        check_said(24, "", "[plugins] compile_cpu_secs = 300");
        check_said(25, "", "[plugins] compiled_mib_max = 256");
        check_said(9, "", "was killed");
        check_said(11, "boom\u{1b}[31m", "signal 11: boom\\u{1b}");
        check_said(256, "error: not a component that can be used: x", "not a component that can be used: x");
        check_said(256, "", "exit status: 1");
    }

    /// What one engine compiles another one takes, though only that of the broker has a pool.
    #[test]
    fn the_engine_with_a_pool_takes_what_one_without_has_compiled() {
        let pool = crate::pool::Pool { instances: 4, memory_bytes: 16 << 20 };
        let pooled = engine::engine(Some(pool)).expect("an engine");
        let alone = engine::engine(None).expect("an engine");
        assert_eq!(crate::cache::compatibility(&pooled), crate::cache::compatibility(&alone));
    }
}
