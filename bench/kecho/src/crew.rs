//! Processes of this program, and brokers, as whoever measures sees them.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use crate::system::{Place, Result, System};

/// How long a broker or a worker has for what it was told, an order included that measures.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a process has to end by itself.
const END: Duration = Duration::from_secs(5);

/// A directory and a broker, if the system has one.
pub struct Stage<'a> {
    pub system: &'a dyn System,
    directory: PathBuf,
    port: u16,
    broker: Option<Child>,
}

impl<'a> Stage<'a> {
    /// Starts the broker and waits until it listens.
    pub fn new(system: &'a dyn System, directory: &Path) -> Result<Stage<'a>> {
        std::fs::create_dir_all(directory)?;
        let mut stage = Stage {
            system,
            directory: directory.into(),
            port: free_port()?,
            broker: None,
        };
        if let Some(command) = system.broker(stage.port, directory)? {
            let log = File::create(directory.join("broker.log"))?;
            // It ends with this process, however that ends.
            let broker = Command::new("setpriv")
                .args(["--pdeathsig", "KILL"])
                .arg(command.get_program())
                .args(command.get_args())
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()?;
            let broker = stage.broker.insert(broker);
            let until = Instant::now() + PATIENCE;
            while TcpStream::connect(("127.0.0.1", stage.port)).is_err() {
                if let Some(status) = broker.try_wait()? {
                    let log = std::fs::read_to_string(directory.join("broker.log"))?;
                    return Err(format!("the broker ended, {status}: {}", log.trim()).into());
                }
                if Instant::now() > until {
                    return Err("the broker does not listen".into());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(stage)
    }

    /// Of a topic that nobody has used.
    pub fn place(&self) -> Result<Place> {
        static TOPICS: AtomicUsize = AtomicUsize::new(0);
        let number = TOPICS.fetch_add(1, Ordering::Relaxed);
        Ok(Place {
            directory: self.directory.clone(),
            broker: self.port,
            topic: format!("bench{number}"),
            port: free_port()?,
        })
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        if let Some(broker) = &mut self.broker {
            let _ = broker.kill();
            let _ = broker.wait();
        }
    }
}

pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Workers that measure one system together.
pub struct Crew {
    system: &'static str,
    log: File,
    workers: Vec<(Child, Option<ChildStdin>)>,
    said: Receiver<(usize, String)>,
    /// Lines that were not waited for yet.
    early: Vec<String>,
    say: Sender<(usize, String)>,
}

impl Crew {
    pub fn new(stage: &Stage<'_>) -> Result<Crew> {
        let (say, said) = mpsc::channel();
        let log = stage.directory.join("workers.log");
        Ok(Crew {
            system: stage.system.name(),
            log: File::options().create(true).append(true).open(log)?,
            workers: Vec::new(),
            said,
            early: Vec::new(),
            say,
        })
    }

    /// Starts one more; it has the next number.
    pub fn add(&mut self, role: &str, arguments: &[&str]) -> Result<()> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([role, self.system])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(self.log.try_clone()?)
            .spawn()?;
        let number = self.workers.len();
        if let Some(output) = child.stdout.take() {
            let say = self.say.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(|line| line.ok()) {
                    if say.send((number, line)).is_err() {
                        return;
                    }
                }
                let _ = say.send((number, "gone".into()));
            });
        }
        let input = child.stdin.take();
        self.workers.push((child, input));
        Ok(())
    }

    pub fn tell(&mut self, worker: usize, order: &str) -> Result<()> {
        if let Some((_, Some(input))) = self.workers.get_mut(worker) {
            writeln!(input, "{order}")?;
        }
        Ok(())
    }

    /// Waits for that many lines that begin with `word`; gives the rest of the last.
    pub fn hear(&mut self, word: &str, count: usize) -> Result<String> {
        let until = Instant::now() + PATIENCE;
        let mut rest = String::new();
        let mut missing = count;
        let (known, early) = std::mem::take(&mut self.early)
            .into_iter()
            .partition(|line: &String| line.split(' ').next() == Some(word));
        self.early = early;
        let mut known: Vec<String> = known;
        while missing > 0 {
            let line = match known.pop() {
                Some(line) => line,
                None => {
                    let left = until.saturating_duration_since(Instant::now());
                    match self.said.recv_timeout(left) {
                        Ok((worker, line)) if line == "gone" => {
                            return Err(format!("worker {worker} has ended").into());
                        }
                        Ok((_, line)) => line,
                        Err(RecvTimeoutError::Timeout) => {
                            let patience = PATIENCE.as_secs();
                            return Err(format!(
                                "{missing} of {count} {word:?} missing after {patience} s"
                            )
                            .into());
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            };
            match line.split_once(' ').unwrap_or((&line, "")) {
                (first, text) if first == word => {
                    rest = text.into();
                    missing -= 1;
                }
                ("error", text) => return Err(text.into()),
                _ => self.early.push(line),
            }
        }
        Ok(rest)
    }

    /// `result A B ...`, as numbers.
    pub fn result(&mut self) -> Result<Vec<f64>> {
        let text = self.hear("result", 1)?;
        let numbers = text.split(' ').map(|number| Ok(number.parse()?));
        numbers.collect()
    }
}

impl Drop for Crew {
    /// The first is told to end, and tells the others through the system; who does not is ended.
    fn drop(&mut self) {
        let _ = self.tell(0, "end");
        let until = Instant::now() + END;
        for (child, _) in &mut self.workers {
            while let Ok(None) = child.try_wait() {
                if Instant::now() > until {
                    let _ = child.kill();
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            let _ = child.wait();
        }
    }
}
