use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, Once};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{Client, Connack, Got, Options};

/// Time for a broker to start and to stop.
const PATIENCE: Duration = Duration::from_secs(30);
/// Names another broker to run the tests against, to see whether the tests are right: `mosquitto`.
const STAND_IN: &str = "WASMQTT_TEST_BROKER";

/// The broker in a process of its own, on a free port; ends with the test, which then shows its log if it failed.
#[derive(Debug)]
pub struct Broker {
    child: Child,
    address: SocketAddr,
    log: Arc<Mutex<String>>,
    folder: TempDir,
}

impl Broker {
    /// Starts it with this configuration, to which a listener is added, and waits until it is ready.
    pub fn start(config: &str) -> Self {
        Self::start_in(tempfile::tempdir().expect("a temporary folder"), config)
    }

    /// The same in a folder that has something in it already; relative paths of the configuration begin there.
    pub fn start_in(folder: TempDir, config: &str) -> Self {
        Self::start_with(folder, config, &[])
    }

    /// The same with more in its environment.
    pub fn start_with(folder: TempDir, config: &str, environment: &[(&str, &Path)]) -> Self {
        let stand_in = std::env::var(STAND_IN).ok();
        let (mut command, known) = match stand_in {
            Some(name) => stand_in_command(&name, folder.path()),
            None => (broker_command(config, folder.path()), None),
        };
        let mut child = command
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        let log = Arc::default();
        collect(child.stderr.take().expect("stderr"), &log);
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let address = known.unwrap_or_else(|| {
            let mut line = String::new();
            // Listeners of the configuration come first, perhaps of another kind.
            while stdout.read_line(&mut line).expect("read stdout") > 0 && line.starts_with("listening on unix:") {
                line.clear();
            }
            let address = line.trim().strip_prefix("listening on mqtt://").and_then(|address| address.parse().ok());
            address.unwrap_or_else(|| {
                let status = child.wait();
                thread::sleep(Duration::from_millis(100)); // for the rest of the log
                panic!("the broker said {line:?} ({status:?}) and logged\n{}", log.lock().expect("log"))
            })
        });
        collect(stdout, &log);
        let broker = Self { child, address, log, folder };
        broker.await_socket();
        broker
    }

    fn await_socket(&self) {
        let start = Instant::now();
        while let Err(error) = std::net::TcpStream::connect(self.address) {
            assert!(start.elapsed() < PATIENCE, "connect to {}: {error}", self.address);
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The folder its configuration lies in.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("log").clone()
    }

    /// Waits until it has logged `line` so often.
    pub fn await_log(&self, line: &str, times: usize) {
        let start = Instant::now();
        while self.log.lock().expect("log").matches(line).count() < times {
            assert!(start.elapsed() < PATIENCE, "not logged {times} times: {line}; but\n{}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in bytes.
    pub fn rss(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("process status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<usize>().ok()).expect("KiB") * 1024
    }

    /// Connects and is let in.
    pub fn connect(&self, options: &Options) -> Client {
        let (mut client, got) = self.try_connect(options);
        let Got::Connack(connack) = got else { panic!("{got:?} instead of CONNACK") };
        assert_eq!(connack.reason, 0, "{connack:?}");
        client.connack = connack;
        client
    }

    /// Sends CONNECT; gives what came back.
    pub fn try_connect(&self, options: &Options) -> (Client, Got) {
        let mut client = Client::open(self.address, options.version);
        client.send_connect(options);
        let got = client.recv();
        (client, got)
    }

    /// Connects and is refused: CONNACK with `code`, which is the version's own, and the end.
    pub fn check_refused(&self, options: &Options, code: u8) {
        let (mut client, got) = self.try_connect(options);
        let Got::Connack(Connack { reason, session_present, .. }) = got else { panic!("{got:?} instead of CONNACK") };
        assert_eq!((reason, session_present), (code, false), "{options:?}");
        assert_eq!(client.recv(), Got::Closed);
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("process id");
        kill_process(pid, signal).expect("signal the broker");
    }

    /// SIGTERM, and a good end.
    pub fn stop(mut self) -> String {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(status.success(), "{status} after SIGTERM");
        self.log()
    }

    /// SIGTERM, and a good end; gives back the folder, for another one.
    pub fn stop_for_another(mut self) -> TempDir {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(status.success(), "{status} after SIGTERM");
        std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a temporary folder"))
    }

    /// The same; gives back the folder, for another one.
    pub fn stop_and_keep(mut self) -> TempDir {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(status.success(), "{status} after SIGTERM");
        std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a temporary folder"))
    }

    /// SIGKILL; gives back the folder, for another one.
    pub fn crash(mut self) -> TempDir {
        self.signal(Signal::KILL);
        let _ = self.wait();
        std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a temporary folder"))
    }

    /// Waits for the end, which something else brings about.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for the broker") {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the broker does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let ended = self.child.try_wait().ok().flatten();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let mut text = format!("--- log of the broker (ended before the test: {ended:?})\n");
            let _ = write!(text, "{}---", self.log.lock().expect("log"));
            println!("{text}");
        }
    }
}

fn collect(mut from: impl Read + Send + 'static, log: &Arc<Mutex<String>>) {
    let log = Arc::clone(log);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            log.lock().expect("log").push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    });
}

fn broker_command(config: &str, folder: &Path) -> Command {
    let file = folder.join("wasmqtt.toml");
    let text = format!("{config}\n[[listener]]\nbind = \"127.0.0.1:0\"\nprotocol = \"mqtt\"\n");
    std::fs::write(&file, text).expect("write the configuration");
    let mut command = Command::new(binary());
    command.arg("serve").arg("--config").arg(file).current_dir(folder);
    command
}

fn stand_in_command(name: &str, folder: &Path) -> (Command, Option<SocketAddr>) {
    let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let file = folder.join("stand-in.conf");
    let text = format!("listener {} 127.0.0.1\nallow_anonymous true\n", address.port());
    std::fs::write(&file, text).expect("write the configuration");
    let mut command = Command::new(name);
    command.arg("-c").arg(file).env("PATH", format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default()));
    (command, Some(address))
}

/// The binary of the same build as the running test, for its other commands.
pub fn wasmqtt() -> Command {
    Command::new(binary())
}

/// The broker of the same build as the running test; built first if only this package was, and sources are newer.
fn binary() -> PathBuf {
    static BUILD: Once = Once::new();
    let test = std::env::current_exe().expect("path of the test");
    let profile = test.parent().and_then(Path::parent).expect("target/PROFILE/deps");
    let path = profile.join(format!("wasmqtt{}", std::env::consts::EXE_SUFFIX));
    BUILD.call_once(|| {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .args(["test", "--quiet", "--workspace", "--no-run", "--test", "cli", "--target-dir"])
            .arg(profile.parent().expect("target"));
        command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        if profile.ends_with("release") {
            command.arg("--release");
        }
        if is_up_to_date(&path) {
            return;
        }
        let status = command.status().unwrap_or_else(|error| panic!("run {command:?}: {error}"));
        assert!(status.success(), "{command:?}: {status}");
    });
    path
}

/// No source of the broker is younger than the binary.
fn is_up_to_date(binary: &Path) -> bool {
    let Ok(built) = binary.metadata().and_then(|binary| binary.modified()) else { return false };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut folders = vec![root.join("broker"), root.join("wit")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            // Tests are no part of the binary.
            if kind.is_dir() && entry.file_name() != "tests" {
                folders.push(entry.path());
            } else if kind.is_file()
                && !entry.file_name().to_string_lossy().ends_with(".md")
                && entry.metadata().and_then(|file| file.modified()).is_ok_and(|at| at > built)
            {
                return false;
            }
        }
    }
    true
}
