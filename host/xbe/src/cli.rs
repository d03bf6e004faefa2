//! The command line. Help, man pages and completions all come from here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
use xbee_api::PublishedPort;

use crate::exit;
use crate::units::{self, StageIn, StageOut};

/// Runs jobs and servers in throw-away virtual machines.
#[derive(Debug, Parser)]
#[command(name = "xbe", version, arg_required_else_help = true, after_help = exit::TABLE, max_term_width = 100)]
pub struct Cli {
    /// Address of the xbed to talk to: unix:///PATH, the path of a socket, or a message broker's queue
    /// as stomp+ssl://[USER:PASSWORD@]HOST[:PORT]/QUEUE [env: XBE_SERVER] [default: this user's local
    /// socket, else root's]
    #[arg(long, global = true, value_name = "URI")]
    pub server: Option<String>,
    /// Who you are to an xbed behind a message broker: DIR/NAME for DIR/NAME.pem and .key, beside ca.pem,
    /// crl.pem and subjects, or DIR with one key [env: XBE_IDENTITY] [default: ~/.config/xbee/pki]
    #[arg(long, global = true, value_name = "DIR[/NAME]", value_hint = ValueHint::AnyPath)]
    pub identity: Option<PathBuf>,
    /// Certificates (PEM) for stomp+ssl that are trusted beside the system's [env: XBE_BROKER_CA]
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub broker_ca: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run one command in a new virtual machine and stream its output
    Run(Run),
    /// Submit a JSDL document; prints the task's id
    Submit(Submit),
    /// Hold capacity for a task to come; prints a ticket, which is the only way to use it
    Reserve(Reserve),
    /// Tell a reserved task what to do
    Confirm(Confirm),
    /// Start a task that was confirmed with --no-start
    Start(Ticket),
    /// Give a reservation back, and end its task
    Cancel(Ticket),
    /// Show a task, with the time it spent in each state
    Status(Status),
    /// Follow a task's states until it has ended; the exit code is the job's
    Watch(Task),
    /// Print what a task wrote
    Logs(Logs),
    /// Fetch the results that a task on another machine keeps for you; prints where they are
    Fetch(Fetch),
    /// End tasks, whatever they are doing
    Terminate(Tasks),
    /// List tasks
    Ps(Ps),
    /// Forget tasks that have ended, with their logs
    Rm(Tasks),
    /// Run a command beside a task, in its virtual machine
    Exec(Exec),
    /// Log in to a task's virtual machine with OpenSSH; needs no network
    Ssh(Ssh),
    /// Check documents
    Check(Check),
    /// Print a task's domain, or the one a job would get, as Xen's own tools take it
    Export(Export),
    /// Show the host: its capacity and images
    Host(Host),
    /// Files that the host has fetched and keeps for your jobs
    Cache(Cache),
    /// Make certificates for sealed messages: a small certification authority
    Pki(Pki),
    /// Say what this machine lacks to run domains, and what to do
    Doctor(Doctor),
    /// Print a script that completes xbe's command line
    Completions {
        /// The shell to complete in.
        shell: Shell,
    },
    /// Write xbe's man pages
    Man {
        /// Directory to write to.
        #[arg(value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
    /// Connect standard input and output to a TCP port of a task's virtual machine
    #[command(hide = true)]
    Proxy {
        /// The task.
        task: String,
        /// The port.
        port: u16,
    },
}

impl Command {
    /// Errors are wanted as JSON.
    pub fn json(&self) -> bool {
        match self {
            Command::Submit(args) => args.json.json,
            Command::Reserve(args) => args.json.json,
            Command::Confirm(args) => args.json.json,
            Command::Start(args) | Command::Cancel(args) => args.json.json,
            Command::Status(args) => args.task.json.json,
            Command::Watch(args) => args.json.json,
            Command::Logs(args) => args.task.json.json,
            Command::Terminate(args) | Command::Rm(args) => args.json.json,
            Command::Ps(args) => args.json.json,
            Command::Check(args) => args.json.json,
            Command::Host(args) => args.json.json,
            Command::Doctor(args) => args.json.json,
            Command::Cache(args) => match &args.action {
                CacheAction::Add { json, .. }
                | CacheAction::Ls { json }
                | CacheAction::Rm { json, .. } => json.json,
            },
            _ => false,
        }
    }
}

/// The cache of fetched files.
#[derive(Debug, Args)]
pub struct Cache {
    /// What to do.
    #[command(subcommand)]
    pub action: CacheAction,
}

/// What one does with the cache.
#[derive(Debug, Subcommand)]
pub enum CacheAction {
    /// Fetch a file into the cache; prints the entry's id, which documents name as the URI cache:ENTRY
    Add {
        /// From where, as the host reaches it: http, https, ftp or file
        uri: String,
        /// What it must be: the SHA-256 of it as it is there, in hexadecimal
        #[arg(long, value_name = "HEX")]
        sha256: Option<String>,
        /// Output for programs.
        #[command(flatten)]
        json: Json,
    },
    /// List your entries; root sees all
    Ls {
        /// Output for programs.
        #[command(flatten)]
        json: Json,
    },
    /// Remove entries; tasks that have the file already keep it
    Rm {
        /// The entries: their ids or the first characters of them, at least 4
        #[arg(value_name = "ENTRY", required = true)]
        entries: Vec<String>,
        /// Output for programs.
        #[command(flatten)]
        json: Json,
    },
}

/// A small certification authority.
#[derive(Debug, Args)]
pub struct Pki {
    /// Directory of the authority; its ca.key is the one secret, keep it from all but its owner
    #[arg(long, value_name = "DIR", default_value = "pki", value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub action: PkiAction,
}

/// What an authority does.
#[derive(Debug, Subcommand)]
pub enum PkiAction {
    /// Make an authority: ca.pem, ca.key, crl.pem
    Init {
        /// Its name
        name: String,
        /// Sign with RSA-3072, not with ECDSA on P-256
        #[arg(long)]
        rsa: bool,
    },
    /// Make a key and a certificate for a year: NAME.key, NAME.pem; and put it on the list of subjects
    Issue {
        /// Whose: the subject is CN=NAME
        name: String,
        /// For an xbed, which answers; else for a user, who asks
        #[arg(long)]
        daemon: bool,
        /// An RSA key of 3072 bits, not one on P-256
        #[arg(long)]
        rsa: bool,
    },
    /// Put certificates on the revocation list, for good; with none, sign the list for another year
    Revoke {
        /// The certificates
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        certificates: Vec<PathBuf>,
    },
}

/// Output for programs.
#[derive(Debug, Args)]
pub struct Json {
    /// Print JSON, one value a line, and errors as JSON on standard error
    #[arg(long)]
    pub json: bool,
}

/// A command on one task.
#[derive(Debug, Args)]
pub struct Task {
    /// The task: its id or the first characters of it, at least 4
    pub task: String,
    /// Output for programs.
    #[command(flatten)]
    pub json: Json,
}

/// A command on tasks.
#[derive(Debug, Args)]
pub struct Tasks {
    /// The tasks: their ids or the first characters of them, at least 4
    #[arg(value_name = "TASK", required = true)]
    pub tasks: Vec<String>,
    /// Output for programs.
    #[command(flatten)]
    pub json: Json,
}

/// `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Image to boot: the name of an installed image, or the URI or path of one [default: the
    /// host's usual one]
    #[arg(long, short = 'I')]
    pub image: Option<String>,
    /// Copy FILE (a path or URI, cache:ENTRY among them) to the absolute path PATH of the guest before
    /// the command starts
    #[arg(short = 'v', long = "volume", value_name = "FILE:PATH", value_parser = units::stage_in)]
    pub stage_in: Vec<StageIn>,
    /// Copy PATH of the guest to FILE (a path or URI) after the command has ended
    #[arg(short = 'o', long = "output", value_name = "PATH:FILE", value_parser = units::stage_out)]
    pub stage_out: Vec<StageOut>,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = units::variable)]
    pub env: Vec<(String, String)>,
    /// Directory of the guest to run the command in
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// Publish the guest's TCP port GUEST at port HOST of the host's loopback, or of this machine's if the host
    /// is another; 0: any free one
    #[arg(short, long, value_name = "HOST:GUEST", value_parser = units::published_port)]
    pub publish: Vec<PublishedPort>,
    /// Number of CPUs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub cpus: Option<u32>,
    /// Memory of the virtual machine: bytes, or with a unit (K, M, G, T; powers of 1024)
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    pub memory: Option<u64>,
    /// Longest run time of the command: seconds, or with units as in 90s, 10m, 1h30m
    #[arg(long, value_name = "TIME", value_parser = units::seconds)]
    pub time: Option<u64>,
    /// Name of the job
    #[arg(long)]
    pub name: Option<String>,
    /// Forget the task when it has ended
    #[arg(long)]
    pub rm: bool,
    /// Print the JSDL document instead of submitting it
    #[arg(long)]
    pub print_jsdl: bool,
    /// Print nothing but the job's output and errors
    #[arg(short, long)]
    pub quiet: bool,
    /// The command and its arguments; no shell is involved
    #[arg(last = true, required = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<String>,
}

/// `submit`.
#[derive(Debug, Args)]
pub struct Submit {
    /// The job.
    #[command(flatten)]
    pub job: Job,
    /// Wait until the task has ended; the exit code is the job's
    #[arg(long)]
    pub wait: bool,
    /// If the xbed cannot begin it at once, let the best of the hosts have it that it knows ([kecho] in its
    /// configuration); says which
    #[arg(long)]
    pub anywhere: bool,
    /// Output for programs.
    #[command(flatten)]
    pub json: Json,
}

/// A job's document, and what is said of it beside.
#[derive(Debug, Args)]
pub struct Job {
    /// The JSDL document; - is standard input
    #[arg(value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Publish the guest's TCP port GUEST at port HOST of the host's loopback, or of this machine's if the host
    /// is another; 0: any free one
    #[arg(short, long, value_name = "HOST:GUEST", value_parser = units::published_port)]
    pub publish: Vec<PublishedPort>,
    /// Accept wrong element order and missing optional wrappers, and say so
    #[arg(long)]
    pub lenient: bool,
    /// Come before those of lower priority that wait; more than 0 is the operator's to give
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    pub priority: i8,
    /// Try so often again if it fails before anything was executed, for a reason that may pass [default:
    /// the host's choice]
    #[arg(long, value_name = "N")]
    pub retries: Option<u32>,
}

/// `reserve`.
#[derive(Debug, Args)]
pub struct Reserve {
    /// From when: RFC 3339 as in 2026-01-31T08:00:00Z, or from now on, as in +90m [default: now]
    #[arg(long, value_name = "TIME", value_parser = units::moment)]
    pub from: Option<units::Moment>,
    /// For how long: seconds, or with units as in 90s, 10m, 1h30m
    #[arg(long = "for", value_name = "TIME", value_parser = units::seconds)]
    pub duration: u64,
    /// Number of CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub cpus: u32,
    /// Memory: bytes, or with a unit (K, M, G, T; powers of 1024)
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::size)]
    pub memory: u64,
    /// Disk of the host: bytes, or with a unit
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    pub disk: Option<u64>,
    /// A name
    #[arg(long)]
    pub name: Option<String>,
    /// Output for programs.
    #[command(flatten)]
    pub json: Json,
}

/// `confirm`.
#[derive(Debug, Args)]
pub struct Confirm {
    /// The reservation's ticket
    pub ticket: String,
    /// The job.
    #[command(flatten)]
    pub job: Job,
    /// Do not start it until `xbe start`
    #[arg(long)]
    pub no_start: bool,
    /// Output for programs.
    #[command(flatten)]
    pub json: Json,
}

/// A command on a reservation.
#[derive(Debug, Args)]
pub struct Ticket {
    /// The reservation's ticket
    pub ticket: String,
    /// Output for programs.
    #[command(flatten)]
    pub json: Json,
}

/// `status`.
#[derive(Debug, Args)]
pub struct Status {
    /// The task.
    #[command(flatten)]
    pub task: Task,
    /// Print the XML of OGSA-BES
    #[arg(long, conflicts_with = "json")]
    pub xml: bool,
}

/// `logs`.
#[derive(Debug, Args)]
pub struct Logs {
    /// The task.
    #[command(flatten)]
    pub task: Task,
    /// Follow until the task has ended
    #[arg(short, long)]
    pub follow: bool,
    /// Standard error instead of standard output
    #[arg(long, conflicts_with = "console")]
    pub stderr: bool,
    /// The virtual machine's console instead of standard output
    #[arg(long)]
    pub console: bool,
}

/// `fetch`.
#[derive(Debug, Args)]
pub struct Fetch {
    /// The task: its id or the first characters of it, at least 4
    pub task: String,
    /// Put them into this directory by their names, and replace nothing there [default: where the task's
    /// document says]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub to: Option<PathBuf>,
}

/// `ps`.
#[derive(Debug, Args)]
pub struct Ps {
    /// Also those that have ended
    #[arg(short, long)]
    pub all: bool,
    /// List the tasks of an array, which are one line otherwise
    #[arg(long, value_name = "TASK")]
    pub array: Option<String>,
    /// Output for programs.
    #[command(flatten)]
    pub json: Json,
}

/// `exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Allocate a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = units::variable)]
    pub env: Vec<(String, String)>,
    /// The task: its id or the first characters of it, at least 4
    pub task: String,
    /// The command and its arguments; no shell is involved
    #[arg(last = true, required = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<String>,
}

/// `ssh`.
#[derive(Debug, Args)]
pub struct Ssh {
    /// The task: its id or the first characters of it, at least 4
    pub task: String,
    /// Options for ssh and the command to run, as after the host's name on ssh's command line
    #[arg(last = true, value_name = "ARGS")]
    pub args: Vec<String>,
}

/// `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// The JSDL documents; - is standard input
    #[arg(required = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub files: Vec<PathBuf>,
    /// Accept wrong element order and missing optional wrappers, and say so
    #[arg(long)]
    pub lenient: bool,
    /// Also ask the running xbed whether it would take the jobs
    #[arg(long)]
    pub host: bool,
    /// Output for programs.
    #[command(flatten)]
    pub json: Json,
}

/// `export`.
#[derive(Debug, Args)]
pub struct Export {
    /// The task, by its id or the first characters of it; or the JSDL document of a job: a path
    /// with a dot or a slash in it, or - for standard input
    #[arg(value_name = "TASK|FILE", value_hint = ValueHint::FilePath)]
    pub what: PathBuf,
    /// Whose words.
    #[command(flatten)]
    pub form: ExportForm,
    /// Accept wrong element order and missing optional wrappers in the document
    #[arg(long)]
    pub lenient: bool,
}

/// One of the forms of `export`.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct ExportForm {
    /// As a configuration file of xl, see xl.cfg(5)
    #[arg(long)]
    pub xl: bool,
    /// As libvirt's XML
    #[arg(long)]
    pub libvirt: bool,
}

/// `host`.
#[derive(Debug, Args)]
pub struct Host {
    /// Output for programs.
    #[command(flatten)]
    pub json: Json,
}

/// `doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    /// What is to run the domains [default: xen on Xen, else qemu]
    #[arg(long, value_enum)]
    pub backend: Option<DoctorBackend>,
    /// The bridge that domains' network interfaces join on Xen
    #[arg(long, value_name = "NAME", default_value = "xenbr0")]
    pub bridge: String,
    /// The registry of channels that `xbed` is to have in [kecho], as tcp:[IPV6]:PORT; with --identity over TLS, as
    /// this host
    #[arg(long, value_name = "ADDRESS")]
    pub registry: Option<xbee_kecho::Address>,
    /// Output for programs.
    #[command(flatten)]
    pub json: Json,
}

/// Back ends that need something of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DoctorBackend {
    /// Plain QEMU
    Qemu,
    /// Xen, in dom0
    Xen,
}
