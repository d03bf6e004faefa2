//! Where `xbed` finds things and how much it may use: command line over file over defaults.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use serde::Deserialize;
use xbee_carry::Address;
use xbee_carry::address::BadAddress;
use xbee_engine::{Capacity, Policy, Quota};
use xbee_hypervisor::qemu::Outbound;
use xbee_kecho::{TlsFiles, is_channel_name};

use crate::anywhere::SERVER_BYTES;
use crate::broker::BrokerOptions;

/// Command line of `xbed`.
#[derive(Debug, Parser)]
#[command(
    name = "xbed",
    version,
    about = "XenBEE's host manager: runs jobs and servers in throw-away virtual machines",
    args_conflicts_with_subcommands = true
)]
pub struct Options {
    /// Something else than to manage this host
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Configuration file (TOML); none is needed
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of all durable state [default: /var/lib/xbee for root, else ~/.local/share/xbee]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Unix socket to listen on [default: /run/xbee/xbed.sock for root, else in the user's run-time directory]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// What runs the domains
    #[arg(long, value_enum)]
    pub backend: Option<Backend>,
    /// Directory of the images that `make images` built [default: $XBEE_IMAGES, else ~/.cache/xbee/images]
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
}

/// What `xbed` can do beside managing the host.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the message broker alone (STOMP 1.0, 1.1 and 1.2)
    Broker(BrokerOptions),
}

/// What runs the domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Plain QEMU, one process a domain
    Qemu,
    /// Xen, through libvirt (needs a program built with the feature xen)
    Xen,
    /// A simulator: nothing is really executed
    Sim,
}

/// The configuration file. Every key may be left out.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    data: Option<PathBuf>,
    socket: Option<PathBuf>,
    backend: Option<Backend>,
    images: Option<PathBuf>,
    #[serde(default, deserialize_with = "program_or_table")]
    qemu: QemuFile,
    vcpus: Option<u32>,
    memory_mib: Option<u64>,
    domains: Option<u32>,
    disk_mib: Option<u64>,
    queue_length: Option<usize>,
    #[serde(default)]
    queue: QueueFile,
    #[serde(default)]
    quota: QuotaFile,
    #[serde(default)]
    quotas: BTreeMap<String, QuotaFile>,
    boot_timeout_s: Option<u64>,
    shutdown_grace_s: Option<u64>,
    terminate_grace_s: Option<u64>,
    ca_file: Option<PathBuf>,
    #[serde(default)]
    xen: XenFile,
    message_queue: Option<MessageQueueFile>,
    pool: Option<MessageQueueFile>,
    kecho: Option<KechoFile>,
    #[serde(default)]
    cache: CacheFile,
}

/// The table `[kecho]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct KechoFile {
    registry: String,
    listen: Option<String>,
    channel: Option<String>,
    address: Option<String>,
    identity: Option<PathBuf>,
    authorities: Option<PathBuf>,
    revoked: Option<PathBuf>,
}

/// The table `[cache]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct CacheFile {
    max_mib: Option<u64>,
    entries: Option<usize>,
}

/// The tables `[message-queue]` and `[pool]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct MessageQueueFile {
    uri: String,
    identity: PathBuf,
    broker_ca: Option<PathBuf>,
    authorities: Option<PathBuf>,
    revoked: Option<PathBuf>,
    subjects: Option<PathBuf>,
}

/// The table `[queue]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct QueueFile {
    half_life_h: Option<u64>,
    reservations: Option<usize>,
    staging_allowance_s: Option<u64>,
    retries: Option<u32>,
    retries_max: Option<u32>,
    retry_delay_s: Option<u64>,
}

/// The table `[quota]`, of every user, and those of `[quotas]`, each of a user by user id.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct QuotaFile {
    vcpus: Option<u64>,
    memory_mib: Option<u64>,
    disk_mib: Option<u64>,
    running: Option<u64>,
    waiting: Option<usize>,
}

impl QuotaFile {
    /// What is not said is as `usual`.
    fn quota(self, usual: Quota) -> Quota {
        let bytes = |mib: u64| mib.saturating_mul(1 << 20);
        Quota {
            vcpus: self.vcpus.unwrap_or(usual.vcpus),
            memory_bytes: self.memory_mib.map_or(usual.memory_bytes, bytes),
            disk_bytes: self.disk_mib.map_or(usual.disk_bytes, bytes),
            running: self.running.unwrap_or(usual.running),
            waiting: self.waiting.unwrap_or(usual.waiting),
        }
    }
}

/// The table `[qemu]`, or the program's path alone.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct QemuFile {
    program: Option<PathBuf>,
    prefix: Option<Prefix>,
    same_owner: Option<SameOwner>,
    #[serde(default)]
    outbound: Outbound,
    bridge: Option<String>,
    firewall: Option<Firewall>,
    guests_socket: Option<PathBuf>,
}

/// Reads `qemu = "PROGRAM"` or `[qemu]`.
fn program_or_table<'de, D: serde::Deserializer<'de>>(from: D) -> Result<QemuFile, D::Error> {
    struct Visitor;
    impl<'de> serde::de::Visitor<'de> for Visitor {
        type Value = QemuFile;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("the path of QEMU's program or a table")
        }

        fn visit_str<E: serde::de::Error>(self, program: &str) -> Result<QemuFile, E> {
            Ok(QemuFile {
                program: Some(program.into()),
                ..QemuFile::default()
            })
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, table: A) -> Result<QemuFile, A::Error> {
            QemuFile::deserialize(serde::de::value::MapAccessDeserializer::new(table))
        }
    }
    from.deserialize_any(Visitor)
}

/// The table `[xen]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct XenFile {
    bridge: Option<String>,
    prefix: Option<Prefix>,
    guests: Option<Guests>,
    firewall: Option<Firewall>,
    same_owner: Option<SameOwner>,
}

/// How Xen runs guests that have a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guests {
    /// With hardware virtualization; those whose kernel cannot be started so, without.
    Pvh,
    /// Without, all of them.
    Pv,
}

/// Who keeps guests on the bridge apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firewall {
    /// The rules of `xen-configs/dom0/xenbee.nft`; without them no domain with a network starts.
    Required,
    /// Something that this program does not know of.
    Off,
}

/// What domains of one owner may do on their network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SameOwner {
    /// They do not reach each other.
    Isolated,
    /// They reach each other.
    Connected,
}

/// The first half of the IPv6 addresses on a network, as `fd00:1:2:3::/64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Prefix(u64);

impl Prefix {
    /// Length of a prefix, in bits.
    pub const BITS: u8 = 64;

    /// The address with this number on the network.
    pub fn address(self, number: u32) -> Ipv6Addr {
        Ipv6Addr::from_bits(u128::from(self.0) << 64 | u128::from(number))
    }
}

impl TryFrom<String> for Prefix {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let address = text.strip_suffix("/64").and_then(|text| text.parse().ok());
        match address.map(Ipv6Addr::to_bits) {
            Some(bits) if bits as u64 == 0 => Ok(Prefix((bits >> 64) as u64)),
            _ => Err(format!(
                "{text:?} is no prefix of 64 bits, which one writes as fd00:1:2:3::/64"
            )),
        }
    }
}

/// What holds after all sources were read.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of all durable state.
    pub data: PathBuf,
    /// Unix socket to listen on.
    pub socket: PathBuf,
    /// What runs the domains.
    pub backend: Backend,
    /// Directory of images.
    pub images: PathBuf,
    /// QEMU's program, where not the one in PATH.
    pub qemu: Option<PathBuf>,
    /// Limits on what domains and the queue take; 0 means "ask the host" until [`Config::capacity`].
    vcpus: Option<u32>,
    memory_mib: Option<u64>,
    disk_mib: Option<u64>,
    /// Domains at a time.
    pub domains: u32,
    queue_length: usize,
    /// Order and bounds of the queue.
    pub policy: Policy,
    /// How much longer than its command a task may hold its place before it stands in the way of reservations.
    pub staging_allowance: Duration,
    /// How often a task that does not say so is tried again.
    pub retries: u32,
    /// Most that a task may ask for.
    pub retries_max: u32,
    /// Wait before the first time; twice as long before each further.
    pub retry_delay: Duration,
    /// How long a domain's agent may take from the start of the domain to its first word.
    pub boot_timeout: Duration,
    /// How long a domain may take to shut down before it is forced.
    pub shutdown_grace: Duration,
    /// How long a task may take between TERM and KILL.
    pub terminate_grace: Duration,
    /// Certificates (PEM) trusted for https beside the system's.
    pub ca_file: Option<PathBuf>,
    /// Bridge that domains are on; `None`, on the back end `qemu` only: they are on the switch's network.
    pub bridge: Option<String>,
    /// Where their addresses are from; `None`: they have no network.
    pub prefix: Option<Prefix>,
    /// How guests are run (back end `xen`).
    #[cfg_attr(
        not(feature = "xen"),
        expect(dead_code, reason = "only that back end can choose")
    )]
    pub guests: Guests,
    /// Who keeps domains on the bridge apart.
    pub firewall: Firewall,
    /// What domains of one owner may do on their network.
    pub same_owner: SameOwner,
    /// Where users' programs reach their domains by vsock (back end `qemu`); `None`: they do not.
    pub guests_socket: Option<PathBuf>,
    /// What domains may reach beyond their network (back end `qemu`).
    pub outbound: Outbound,
    /// The queue that users on other machines ask through.
    pub message_queue: Option<MessageQueue>,
    /// The queue that this host shares with others, who have the same identity there.
    pub pool: Option<MessageQueue>,
    /// The channel on which hosts tell each other what they could run.
    pub kecho: Option<Kecho>,
    /// What fetched files may take that are kept.
    pub cache: CacheLimits,
}

/// A channel of hosts.
#[derive(Debug, Clone)]
pub struct Kecho {
    /// The registry of channels.
    pub registry: xbee_kecho::Address,
    /// Where other hosts reach this one on the channel, beside a port that the system chooses.
    pub listen: Option<xbee_kecho::Address>,
    /// The channel's name.
    pub channel: String,
    /// Where clients reach this host: a queue of a message broker, or a socket of this machine.
    pub address: String,
    /// Who this host is to the others; without, it reaches none on other machines.
    pub identity: Option<TlsFiles>,
}

/// An address as others are told it: without user and password.
fn told(address: &Address) -> String {
    let vhost = &address.broker.virtual_host;
    match vhost.as_str() {
        "/" => address.to_string(),
        vhost => {
            let vhost: String = url::form_urlencoded::byte_serialize(vhost.as_bytes()).collect();
            format!("{address}?vhost={vhost}")
        }
    }
}

impl KechoFile {
    fn read(
        self,
        path: &Path,
        queue: Option<&MessageQueue>,
        socket: &Path,
    ) -> Result<Kecho, ConfigError> {
        let wrong = |key, detail| ConfigError::Kecho {
            key,
            path: path.into(),
            detail,
        };
        let channel = self.channel.unwrap_or_else(|| KECHO_CHANNEL.to_owned());
        if !is_channel_name(&channel) {
            let detail = "expected 1 to 128 ASCII letters, digits, '_', '-', '.', '/' or ':'";
            return Err(wrong("channel", detail));
        }
        let node = |key, address: String| {
            let detail = "expected tcp:[IPV6]:PORT or unix:/PATH";
            address.parse().map_err(|_| wrong(key, detail))
        };
        let registry = node("registry", self.registry)?;
        let listen = self
            .listen
            .map(|listen| node("listen", listen))
            .transpose()?;
        let address = match (self.address, queue) {
            (Some(address), _) => address,
            (None, Some(queue)) => told(&queue.address),
            (None, None) => {
                let socket = std::path::absolute(socket).unwrap_or_else(|_| socket.into());
                format!("unix://{}", socket.display())
            }
        };
        if address.len() > usize::from(SERVER_BYTES) || address.contains(char::is_control) {
            return Err(wrong("address", "it may have 255 bytes"));
        }
        if Address::is_meant(&address) {
            let queue: Address = address.parse().map_err(|source| ConfigError::Queue {
                table: "kecho",
                path: path.into(),
                source,
            })?;
            if queue.broker.login.is_some() || queue.broker.passcode.is_some() {
                let detail =
                    "all hosts and their users are told it, so leave user and password out";
                return Err(wrong("address", detail));
            }
        } else if !address.starts_with("unix:///") {
            let detail = "expected stomp+ssl://BROKER/QUEUE or unix:///PATH";
            return Err(wrong("address", detail));
        }
        let identity = self.identity.map(|identity| {
            let files = xbee_carry::identity::Files::find(&identity);
            let files = files.map_err(|source| ConfigError::Identity {
                table: "kecho",
                source,
            })?;
            Ok(TlsFiles {
                ca: self.authorities.unwrap_or(files.trust.authorities),
                certificate: files.certificate,
                key: files.key,
                crl: Some(self.revoked.unwrap_or(files.trust.revoked)),
            })
        });
        Ok(Kecho {
            registry,
            listen,
            channel,
            address,
            identity: identity.transpose()?,
        })
    }
}

/// Bounds of the cache of fetched files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLimits {
    /// Space on the disk, bytes; 0: there is no cache. One entry may take as much.
    pub max_bytes: u64,
    /// Entries.
    pub entries: usize,
}

/// A queue of a message broker.
#[derive(Debug, Clone)]
pub struct MessageQueue {
    /// Where it is.
    pub address: Address,
    /// How to reach the broker.
    pub options: xbee_carry::Options,
    /// Who this `xbed` is there, and whom it believes.
    pub identity: xbee_carry::identity::Files,
}

impl MessageQueueFile {
    fn read(self, table: &'static str, path: &Path) -> Result<MessageQueue, ConfigError> {
        let address = self.uri.parse().map_err(|source| ConfigError::Queue {
            table,
            path: path.into(),
            source,
        })?;
        let identity = xbee_carry::identity::Files::find(&self.identity);
        let mut identity = identity.map_err(|source| ConfigError::Identity { table, source })?;
        let trust = &mut identity.trust;
        for (file, other) in [
            (&mut trust.authorities, self.authorities),
            (&mut trust.revoked, self.revoked),
            (&mut trust.subjects, self.subjects),
        ] {
            if let Some(other) = other {
                *file = other;
            }
        }
        Ok(MessageQueue {
            address,
            options: xbee_carry::Options {
                broker_ca: self.broker_ca,
            },
            identity,
        })
    }
}

/// The channel of hosts, unless configured.
const KECHO_CHANNEL: &str = "xbee.hosts";
/// Virtual CPUs given out for each logical CPU of the host, unless configured: most domains wait most of the time.
const VCPUS_PER_CPU: u32 = 4;

/// Space for the cache, MiB, unless configured.
const CACHE_MIB: u64 = 16 << 10;
/// Entries of the cache, unless configured.
const CACHE_ENTRIES: usize = 1000;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A quota is nobody's.
    #[error(
        "[quotas.{name}] of the configuration file {path}: {name:?} is no user id, which is a number; `id -u NAME` says it"
    )]
    NoUser {
        /// The file.
        path: PathBuf,
        /// The key.
        name: String,
    },
    /// What a bridge lets out is not for this process to say.
    #[error(
        "[qemu] of the configuration file {path} has `bridge` and `outbound`: with a bridge, the host's own routing and firewall let domains out, so leave one of them away"
    )]
    BridgeAndOutbound {
        /// The file.
        path: PathBuf,
    },
    /// The message queue has no address.
    #[error("`uri` in [{table}] of the configuration file {path}")]
    Queue {
        /// Of which queue.
        table: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: BadAddress,
    },
    /// Nobody to be on the message queue.
    #[error("`identity` in [{table}] of the configuration file")]
    Identity {
        /// Of which queue.
        table: &'static str,
        /// Why.
        #[source]
        source: xbee_carry::identity::Error,
    },
    /// The channel of hosts.
    #[error("`{key}` in [kecho] of the configuration file {path}: {detail}")]
    Kecho {
        /// Which key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        detail: &'static str,
    },
    /// The file makes no sense.
    #[error("the configuration file {path} is not as expected")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
}

impl Config {
    /// Puts the three sources together.
    pub fn load(options: Options) -> Result<Config, ConfigError> {
        let file = match &options.config {
            Some(path) => read(path)?,
            None => File::default(),
        };
        let backend = options.backend.or(file.backend).unwrap_or(Backend::Qemu);
        let (prefix, same_owner) = match backend {
            Backend::Qemu => (file.qemu.prefix, file.qemu.same_owner),
            Backend::Xen => (file.xen.prefix, file.xen.same_owner),
            Backend::Sim => (None, None),
        };
        let (bridge, firewall) = match backend {
            Backend::Qemu => (file.qemu.bridge, file.qemu.firewall),
            Backend::Xen => {
                let usual = || "xenbr0".to_owned();
                (file.xen.bridge.or_else(|| Some(usual())), file.xen.firewall)
            }
            Backend::Sim => (None, None),
        };
        if backend == Backend::Qemu && bridge.is_some() && file.qemu.outbound != Outbound::Off {
            return Err(ConfigError::BridgeAndOutbound {
                path: options.config.unwrap_or_default(),
            });
        }
        let path = options.config.clone().unwrap_or_default();
        let message_queue = file
            .message_queue
            .map(|queue| queue.read("message-queue", &path));
        let message_queue = message_queue.transpose()?;
        let pool = file.pool.map(|queue| queue.read("pool", &path));
        let socket = options
            .socket
            .or(file.socket)
            .unwrap_or_else(xbee_api::default_socket);
        let kecho = file
            .kecho
            .map(|kecho| kecho.read(&path, message_queue.as_ref(), &socket));
        let quota = file.quota.quota(Quota::UNLIMITED);
        let mut quotas = HashMap::new();
        for (name, of_user) in &file.quotas {
            let uid = name.parse().map_err(|_| ConfigError::NoUser {
                path: options.config.clone().unwrap_or_default(),
                name: name.clone(),
            })?;
            quotas.insert(uid, of_user.quota(quota));
        }
        let data = options.data.or(file.data).unwrap_or_else(default_data);
        let usual = Policy::default();
        let policy = Policy {
            quota,
            quotas,
            half_life_ms: file
                .queue
                .half_life_h
                .map_or(usual.half_life_ms, |hours| hours.saturating_mul(3_600_000)),
            reservations: file.queue.reservations.unwrap_or(usual.reservations),
        };
        Ok(Config {
            message_queue,
            kecho: kecho.transpose()?,
            cache: CacheLimits {
                max_bytes: file
                    .cache
                    .max_mib
                    .unwrap_or(CACHE_MIB)
                    .saturating_mul(1 << 20),
                entries: file.cache.entries.unwrap_or(CACHE_ENTRIES),
            },
            pool: pool.transpose()?,
            policy,
            staging_allowance: Duration::from_secs(file.queue.staging_allowance_s.unwrap_or(600)),
            retries: file.queue.retries.unwrap_or(0),
            retries_max: file.queue.retries_max.unwrap_or(10),
            retry_delay: Duration::from_secs(file.queue.retry_delay_s.unwrap_or(10)),
            disk_mib: file.disk_mib,
            // Other processes have other working directories.
            data: std::path::absolute(&data).unwrap_or(data),
            socket,
            backend,
            images: options
                .images
                .or(file.images)
                .unwrap_or_else(crate::images::default_directory),
            qemu: file.qemu.program,
            vcpus: file.vcpus,
            memory_mib: file.memory_mib,
            domains: file.domains.unwrap_or(64),
            queue_length: file.queue_length.unwrap_or(100_000),
            boot_timeout: Duration::from_secs(file.boot_timeout_s.unwrap_or(120)),
            shutdown_grace: Duration::from_secs(file.shutdown_grace_s.unwrap_or(30)),
            terminate_grace: Duration::from_secs(file.terminate_grace_s.unwrap_or(5)),
            ca_file: file.ca_file,
            bridge,
            prefix,
            guests: file.xen.guests.unwrap_or(Guests::Pvh),
            firewall: firewall.unwrap_or(Firewall::Required),
            same_owner: same_owner.unwrap_or(SameOwner::Isolated),
            guests_socket: file.qemu.guests_socket.filter(|_| backend == Backend::Qemu),
            outbound: match backend {
                Backend::Qemu => file.qemu.outbound,
                Backend::Xen | Backend::Sim => Outbound::Off,
            },
        })
    }

    /// Directory of the domains' own directories. Short, for the length of socket paths is limited.
    pub fn domains(&self) -> PathBuf {
        self.data.join("run")
    }

    /// What domains may take of a host with these CPUs, this memory and so much free disk.
    pub fn capacity(
        &self,
        host_cpus: u32,
        host_memory_bytes: u64,
        host_disk_bytes: u64,
    ) -> Capacity {
        Capacity {
            vcpus: self
                .vcpus
                .unwrap_or(host_cpus.saturating_mul(VCPUS_PER_CPU)),
            memory_bytes: self
                .memory_mib
                .map_or(host_memory_bytes, |mib| mib.saturating_mul(1 << 20)),
            disk_bytes: self
                .disk_mib
                .map_or(host_disk_bytes, |mib| mib.saturating_mul(1 << 20)),
            domains: self.domains,
            queue_length: self.queue_length,
        }
    }
}

fn read(path: &Path) -> Result<File, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.into(),
        source,
    })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse {
        path: path.into(),
        source: Box::new(source),
    })
}

fn default_data() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return "/var/lib/xbee".into();
    }
    crate::images::home_directory("XDG_DATA_HOME", ".local/share").join("xbee")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_wins_over_the_file_and_the_file_over_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("xbed.toml");
        std::fs::write(&path, "backend = \"sim\"\ndata = \"/a\"\nmemory-mib = 5\n").unwrap();
        let options =
            Options::parse_from(["xbed", "--config", path.to_str().unwrap(), "--data", "/b"]);
        let config = Config::load(options).unwrap();
        assert_eq!(config.backend, Backend::Sim);
        assert_eq!(config.data, Path::new("/b"));
        let capacity = config.capacity(2, 1 << 40, 7);
        assert_eq!((capacity.vcpus, capacity.memory_bytes), (8, 5 << 20));
    }

    #[test]
    fn each_back_end_has_a_network_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("xbed.toml");
        let load = |text: &str, backend| {
            std::fs::write(&path, text).unwrap();
            let path = path.to_str().unwrap();
            Config::load(Options::parse_from([
                "xbed",
                "--config",
                path,
                "--backend",
                backend,
            ]))
        };
        let both = "[qemu]\nprogram = \"/q\"\nprefix = \"fd00:1::/64\"\nsame-owner = \"connected\"\n\
                    [xen]\nprefix = \"fd00:2::/64\"\n";
        let place = |config: Config| {
            (
                config.prefix.map(|p| p.address(3).to_string()),
                config.same_owner,
            )
        };
        let qemu = load(both, "qemu").unwrap();
        assert_eq!(qemu.qemu.as_deref(), Some(Path::new("/q")));
        assert_eq!(
            place(qemu),
            (Some("fd00:1::3".into()), SameOwner::Connected)
        );
        let xen = place(load(both, "xen").unwrap());
        assert_eq!(xen, (Some("fd00:2::3".into()), SameOwner::Isolated));
        assert_eq!(
            place(load(both, "sim").unwrap()),
            (None, SameOwner::Isolated)
        );
        let old = load("qemu = \"/q\"\n", "qemu").unwrap();
        assert_eq!(old.qemu.as_deref(), Some(Path::new("/q")));
        assert_eq!(place(old), (None, SameOwner::Isolated));
        assert_eq!(load(both, "qemu").unwrap().guests_socket, None);
        let socket = "[qemu]\nguests-socket = \"/run/xbee/guests\"\n";
        let path = Path::new("/run/xbee/guests");
        let here = load(socket, "qemu").unwrap().guests_socket;
        assert_eq!(here.as_deref(), Some(path));
        assert_eq!(load(socket, "sim").unwrap().guests_socket, None);
        let outbound = "[qemu]\noutbound = [\"[::1]:80\", \"2001:db8::/32:*\"]\n";
        let rules = load(outbound, "qemu").unwrap().outbound;
        assert!(matches!(rules, Outbound::List(rules) if rules.len() == 2));
        assert_eq!(load(outbound, "xen").unwrap().outbound, Outbound::Off);
        assert_eq!(load(both, "qemu").unwrap().outbound, Outbound::Off);
        let error = load("[qemu]\noutbound = \"all\"\n", "qemu").unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("neither \"off\" nor \"open\""), "{cause}");
        let error = load("[qemu]\nbridges = \"b\"\n", "qemu").unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("bridges"), "{cause}");
        let on_a_bridge = load("[qemu]\nbridge = \"b\"\nfirewall = \"off\"\n", "qemu").unwrap();
        assert_eq!(on_a_bridge.bridge.as_deref(), Some("b"));
        assert_eq!(on_a_bridge.firewall, Firewall::Off);
        assert_eq!(load("", "qemu").unwrap().bridge, None);
        assert_eq!(load("", "xen").unwrap().bridge.as_deref(), Some("xenbr0"));
        let error = load("[qemu]\nbridge = \"b\"\noutbound = \"open\"\n", "qemu").unwrap_err();
        assert!(
            error.to_string().contains("`bridge` and `outbound`"),
            "{error}"
        );
    }

    #[test]
    fn users_have_quotas_and_some_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("xbed.toml");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Config::load(Options::parse_from([
                "xbed",
                "--config",
                path.to_str().unwrap(),
            ]))
        };
        let policy = load("[quota]\nvcpus = 4\ndisk-mib = 2\n[quotas.1000]\nvcpus = 9\n")
            .unwrap()
            .policy;
        let own = policy.quotas[&1000];
        assert_eq!((policy.quota.vcpus, policy.quota.disk_bytes), (4, 2 << 20));
        assert_eq!((own.vcpus, own.disk_bytes), (9, 2 << 20));
        assert_eq!(own.memory_bytes, u64::MAX);
        let error = load("[quotas.alice]\nvcpus = 9\n").unwrap_err().to_string();
        assert!(error.contains("\"alice\" is no user id"), "{error}");
    }

    #[test]
    fn addresses_of_domains_come_from_the_prefix() {
        let prefix = Prefix::try_from("fd00:1:2:3::/64".to_owned()).unwrap();
        assert_eq!(prefix.address(0x1_0002).to_string(), "fd00:1:2:3::1:2");
        for wrong in ["fd00::", "fd00::/48", "fd00::1/64", "10.0.0.0/64", ""] {
            let error = Prefix::try_from(wrong.to_owned()).unwrap_err();
            assert!(error.contains("fd00:1:2:3::/64"), "{error}");
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("xbed.toml");
        std::fs::write(&path, "\nbackends = \"sim\"\n").unwrap();
        let options = Options::parse_from(["xbed", "--config", path.to_str().unwrap()]);
        let error = Config::load(options).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(
            cause.contains("line 2") && cause.contains("backends"),
            "{cause}"
        );
    }

    #[test]
    fn others_are_told_where_this_host_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("xbed.toml");
        let load = |lines: &str| {
            let registry = "[kecho]\nregistry = \"tcp:[::1]:7400\"\n";
            std::fs::write(&path, format!("{registry}{lines}")).unwrap();
            let path = path.to_str().unwrap();
            let options = ["xbed", "--config", path, "--socket", "/run/x/s"];
            Config::load(Options::parse_from(options)).map(|config| config.kecho.unwrap())
        };
        let kecho = load("").unwrap();
        assert_eq!(kecho.address, "unix:///run/x/s");
        assert_eq!(
            (kecho.channel.as_str(), kecho.identity.is_none()),
            ("xbee.hosts", true)
        );
        let queue = "[message-queue]\nuri = \"stomp://me:secret@h/q\"\nidentity = \"/p/x\"\n";
        let kecho = load(&format!("identity = \"/p/x\"\nchannel = \"c\"\n{queue}")).unwrap();
        assert_eq!(kecho.address, "stomp://h:61613/q");
        let identity = kecho.identity.unwrap();
        assert_eq!(identity.certificate, Path::new("/p/x.pem"));
        assert_eq!(identity.ca, Path::new("/p/ca.pem"));
        assert_eq!(identity.crl.as_deref(), Some(Path::new("/p/crl.pem")));
        let kecho = load("identity = \"/p/x\"\nrevoked = \"/r\"\n").unwrap();
        let identity = kecho.identity.unwrap();
        assert_eq!(identity.crl.as_deref(), Some(Path::new("/r")));
        for (address, told) in [
            ("stomp://me:secret@h/q", "password out"),
            ("stomp://h/a/b", "a queue's name"),
            ("/run/x/s", "unix:///PATH"),
            (&format!("unix:///{}", "x".repeat(255)), "255 bytes"),
        ] {
            let error = load(&format!("address = {address:?}\n")).unwrap_err();
            let error = xbee_api::chain(&error);
            assert!(error.contains(told) && !error.contains("secret"), "{error}");
        }
        for (line, told) in [
            ("channel = \"a b\"", "`channel` in [kecho]"),
            ("listen = \"127.0.0.1:7401\"", "tcp:[IPV6]:PORT"),
        ] {
            let error = xbee_api::chain(&load(&format!("{line}\n")).unwrap_err());
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn a_message_queue_has_an_address_and_an_identity() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("xbed.toml");
        let load = |lines: &str| {
            std::fs::write(&path, format!("[message-queue]\n{lines}")).unwrap();
            Config::load(Options::parse_from([
                "xbed",
                "--config",
                path.to_str().unwrap(),
            ]))
        };
        let uri = "uri = \"stomp://me:secret@h/q\"\n";
        let config = load(&format!("{uri}identity = \"/p/x\"\nrevoked = \"/r\"\n"));
        let queue = config.unwrap().message_queue.unwrap();
        assert_eq!(queue.address.destination(), "/queue/q");
        let files = &queue.identity;
        assert_eq!(files.key, Path::new("/p/x.key"));
        assert_eq!(files.trust.authorities, Path::new("/p/ca.pem"));
        assert_eq!(files.trust.revoked, Path::new("/r"));
        // A directory stands for the one key in it.
        let identity = format!("{uri}identity = {:?}\n", dir.path());
        let why = |error: ConfigError| xbee_api::chain(&error);
        assert!(why(load(&identity).unwrap_err()).contains("has 0 keys"));
        for name in ["ca.key", "me.key"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let queue = load(&identity).unwrap().message_queue.unwrap();
        assert_eq!(queue.identity.certificate, dir.path().join("me.pem"));
        let wrong = why(load("uri = \"http://me:secret@h\"\nidentity = \"/p\"\n").unwrap_err());
        assert!(
            wrong.contains("stomp+ssl://") && !wrong.contains("secret"),
            "{wrong}"
        );
    }
}
