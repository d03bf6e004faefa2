//! The messages between client and daemon, and their XML. `schema/xbe-messages.xsd` says the same for others.

use std::fmt;
use std::io;
use std::str::FromStr;

use openssl::base64;
use time::{Date, OffsetDateTime, PrimitiveDateTime, Time};
use uuid::Uuid;

use crate::xml::{self, Element, Fields, leaf, node};

/// A message's XML has at most so many bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Why something is no message, or cannot be made one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Over [`MAX_MESSAGE_BYTES`].
    #[error("the message has {0} bytes, expected at most {MAX_MESSAGE_BYTES}")]
    Large(usize),
    /// Not in UTF-8.
    #[error("the message is not in UTF-8")]
    NotUtf8(#[source] std::str::Utf8Error),
    /// Not well-formed.
    #[error("the message is not well-formed XML")]
    NotXml(#[source] quick_xml::Error),
    /// Something where it may not be.
    #[error("{0} where none is expected in a message")]
    Misplaced(&'static str),
    /// A reference to an entity that XML itself does not have.
    #[error("entity '{0}' in a message, expected only those of XML itself")]
    Entity(String),
    /// An attribute that declares no namespace.
    #[error("attribute '{0}' in a message, expected none")]
    Attribute(String),
    /// A character that XML cannot hold.
    #[error("character U+{0:04X} in '{1}': XML cannot hold it")]
    Character(u32, String),
    /// Elements too many or too deep.
    #[error("the message has too many elements, or too deep ones")]
    TooMany,
    /// An element that is not known in its place.
    #[error("unexpected element '{0}' in a message")]
    Unknown(String),
    /// An element that is missing.
    #[error("{0} is missing in '{1}'")]
    Missing(&'static str, String),
    /// A value that its element cannot have.
    #[error("the value of '{0}' is not one of its type")]
    Value(&'static str),
    /// The writer failed.
    #[error("cannot write the message")]
    Write(#[source] io::Error),
}

/// A point in time: milliseconds since the Unix epoch, from 1970 to 9999; an `xs:dateTime` in UTC in XML.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(u64);

impl Millis {
    /// The last millisecond of the year 9999.
    pub const MAX: Millis = Millis(253_402_300_799_999);

    /// Nothing after the year 9999.
    pub fn new(ms: u64) -> Option<Self> {
        (ms <= Self::MAX.0).then_some(Millis(ms))
    }

    /// The system's clock.
    pub fn now() -> Self {
        let now = OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
        Millis(u64::try_from(now).unwrap_or(0).min(Self::MAX.0))
    }

    /// Milliseconds since the Unix epoch.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = i64::try_from(self.0 / 1000).map_err(|_| fmt::Error)?;
        let at = OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| fmt::Error)?;
        let (date, ms) = (at.date(), self.0 % 1000);
        let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
        let (hour, minute, second) = at.to_hms();
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z"
        )
    }
}

impl FromStr for Millis {
    type Err = ();

    /// Only the form that is written: `2026-01-02T03:04:05.678Z`.
    fn from_str(text: &str) -> Result<Self, ()> {
        const FORM: &[u8] = b"0000-00-00T00:00:00.000Z";
        let same = |(a, b): (&u8, u8)| {
            if *a == b'0' {
                b.is_ascii_digit()
            } else {
                *a == b
            }
        };
        if text.len() != FORM.len() || !FORM.iter().zip(text.bytes()).all(same) {
            return Err(());
        }
        let number = |range: std::ops::Range<usize>| text[range].parse::<u16>().map_err(|_| ());
        let small = |range| number(range).and_then(|n| u8::try_from(n).map_err(|_| ()));
        let month = small(5..7)?.try_into().map_err(|_| ())?;
        let date = Date::from_calendar_date(i32::from(number(0..4)?), month, small(8..10)?);
        let time = Time::from_hms_milli(
            small(11..13)?,
            small(14..16)?,
            small(17..19)?,
            number(20..23)?,
        );
        let at = PrimitiveDateTime::new(date.map_err(|_| ())?, time.map_err(|_| ())?).assume_utc();
        let ms = u64::try_from(at.unix_timestamp_nanos() / 1_000_000).map_err(|_| ())?;
        Millis::new(ms).ok_or(())
    }
}

/// What a message says of itself. Its signature covers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The receiver: the subject of its certificate.
    pub to: String,
    /// The sender: the subject of its certificate.
    pub from: String,
    /// Random, another one for each message.
    pub id: Uuid,
    /// The message that this one answers.
    pub answers: Option<Uuid>,
    /// When it was made.
    pub time: Millis,
    /// Random, one for each run of a sender; sequence numbers belong to it.
    pub stream: Uuid,
    /// From 1, larger with every message of the stream.
    pub sequence: u64,
    /// Of several daemons that share a certificate: the one that it is for, or, with a certificate, the one that shows it.
    pub member: Option<Uuid>,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// What it says of itself.
    pub header: Header,
    /// What it says.
    pub body: Body,
}

/// The kinds of messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// The sender's certificate, in PEM. It is sent unsealed: at first contact, by both sides. Beside it only an
    /// [`Body::Error`] may come unsealed, and is no more than a hint then.
    Certificate(String),
    /// Asks for capacity.
    ReservationRequest {
        /// A name for people.
        name: Option<String>,
        /// From when; now, if it is not said.
        from: Option<Millis>,
        /// For how long, seconds.
        duration_s: u64,
        /// Virtual CPUs.
        cpus: u32,
        /// Memory in bytes.
        memory_bytes: u64,
        /// Disk in bytes.
        disk_bytes: u64,
    },
    /// Capacity is held.
    ReservationResponse {
        /// Who has it may use the reservation.
        ticket: String,
        /// The task to be.
        task: Uuid,
    },
    /// Says what a reserved task is to do.
    ConfirmReservation {
        /// The ticket of the reservation.
        ticket: String,
        /// A JSDL document.
        job: String,
        /// Start it when the reservation begins; else on a [`Body::StartRequest`].
        start: bool,
    },
    /// Starts a confirmed task.
    StartRequest {
        /// The ticket of the reservation.
        ticket: String,
    },
    /// Asks for the state of a task, or of all that are the sender's.
    StatusRequest {
        /// The task.
        task: Option<Uuid>,
    },
    /// Answers a [`Body::StatusRequest`].
    StatusList(Vec<TaskState>),
    /// Ends a task.
    TerminateRequest {
        /// The task.
        task: Uuid,
        /// Why, for people.
        reason: Option<String>,
    },
    /// Fetches a file into the cache.
    CacheFile {
        /// Where it is.
        uri: String,
        /// Its digest: `sha256:` and so on, as staging takes it.
        digest: Option<String>,
    },
    /// Removes an entry of the cache.
    CacheRemove {
        /// The entry.
        entry: String,
    },
    /// Asks what is in the cache.
    ListCache,
    /// Answers [`Body::ListCache`] and [`Body::CacheFile`].
    CacheEntries(Vec<CacheEntry>),
    /// Opens a connection to the daemon's API, which is HTTP/1.1. What both sides say is in further messages.
    Connect {
        /// Random, another one for each connection.
        connection: Uuid,
    },
    /// A piece of what a side says on a connection.
    Data {
        /// The connection.
        connection: Uuid,
        /// How many bytes its sender has said before.
        offset: u64,
        /// The piece; base64 (RFC 4648) in XML.
        bytes: Vec<u8>,
    },
    /// The sender has taken what comes before the offset, and lives.
    Taken {
        /// The connection.
        connection: Uuid,
        /// Bytes.
        offset: u64,
    },
    /// The sender says no more on a connection.
    End {
        /// The connection.
        connection: Uuid,
        /// How many bytes it has said in all.
        offset: u64,
    },
    /// A connection is no more.
    Reset {
        /// The connection.
        connection: Uuid,
        /// Why, for people.
        reason: String,
    },
    /// A task that waits for one of several daemons that share a certificate, from one of them to all.
    Offer {
        /// The task to be.
        task: Uuid,
        /// The subject whose it is.
        owner: String,
        /// What it is to do: the request of the API, in JSON.
        request: String,
    },
    /// How a request ended, if there is nothing else to answer.
    Error {
        /// The kind.
        fault: Fault,
        /// For people.
        text: String,
    },
}

/// A task in a [`Body::StatusList`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskState {
    /// The task.
    pub task: Uuid,
    /// As OGSA-BES has it: `Pending`, `Running`, `Finished`, `Failed` or `Cancelled`.
    pub state: String,
    /// XenBEE's sub-state.
    pub substate: Option<String>,
    /// The exit code of its program.
    pub exit_code: Option<i32>,
    /// Why it is where it is, for people.
    pub reason: Option<String>,
}

/// An entry of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheEntry {
    /// Its name in the cache.
    pub entry: String,
    /// Where it came from.
    pub uri: String,
    /// Its size.
    pub size_bytes: u64,
}

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident = $code:literal $text:literal),* $(,)?) => {
        /// Kinds of [`Body::Error`]. The numbers are stable.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Fault { $($(#[$doc])* $name),* }

        impl Fault {
            /// All of them.
            pub const ALL: &[Fault] = &[$(Fault::$name),*];

            /// Its number.
            pub fn code(self) -> u16 {
                match self { $(Fault::$name => $code),* }
            }

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Fault::$name => $text),* }
            }
        }
    };
}

faults! {
    /// It was done.
    Ok = 200 "OK",
    /// It is being done; ask again.
    Pending = 300 "PENDING",
    /// The request is not understood.
    BadRequest = 400 "BAD_REQUEST",
    /// There is no such thing.
    NotFound = 404 "NOT_FOUND",
    /// The daemon failed.
    Internal = 500 "INTERNAL_ERROR",
    /// No such ticket, or not the sender's.
    TicketInvalid = 501 "TICKET_INVALID",
    /// The sender may not: unknown, foreign, expired, revoked or not authorised.
    Unauthorized = 502 "UNAUTHORIZED",
    /// The message is not as it was sent: altered, truncated, replayed, late or out of order.
    Security = 503 "SECURITY_ERROR",
    /// No capacity for it.
    Busy = 504 "BUSY",
}

impl Body {
    /// The connection that it belongs to and does not open: to nobody else it says anything.
    pub fn within(&self) -> Option<Uuid> {
        match self {
            Body::Data { connection, .. }
            | Body::Taken { connection, .. }
            | Body::End { connection, .. }
            | Body::Reset { connection, .. } => Some(*connection),
            _ => None,
        }
    }
}

impl Message {
    /// The XML of the message.
    pub fn to_xml(&self) -> Result<Vec<u8>, Error> {
        let header = &self.header;
        let mut fields = vec![
            named("xbemsg:to", &header.to),
            named("xbemsg:from", &header.from),
            leaf("MessageID", header.id),
        ];
        fields.extend(header.answers.map(|id| leaf("Answers", id)));
        fields.push(leaf("Time", header.time));
        fields.push(leaf("Stream", header.stream));
        fields.push(leaf("Sequence", header.sequence));
        fields.extend(header.member.map(|member| leaf("Member", member)));
        let root = wrap(
            "xbemsg:message",
            vec![
                wrap("xbemsg:header", fields),
                wrap("xbemsg:body", vec![write(&self.body)]),
            ],
        );
        let bytes = xml::write(&root)?;
        match bytes.len() > MAX_MESSAGE_BYTES {
            true => Err(Error::Large(bytes.len())),
            false => Ok(bytes),
        }
    }

    /// Reads the XML of a message.
    pub fn from_xml(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(Error::Large(bytes.len()));
        }
        let text = std::str::from_utf8(bytes).map_err(Error::NotUtf8)?;
        let mut root = Fields::new(expect(Some(xml::read(text)?), "xbemsg:message")?)?;
        let mut header = Fields::new(expect(root.element("xbemsg:header"), "xbemsg:header")?)?;
        let read = Header {
            to: header.text("xbemsg:to")?,
            from: header.text("xbemsg:from")?,
            id: header.value("xbe:MessageID")?,
            answers: header.optional_value("xbe:Answers")?,
            time: header.value("xbe:Time")?,
            stream: header.value("xbe:Stream")?,
            sequence: header.value("xbe:Sequence")?,
            member: header.optional_value("xbe:Member")?,
        };
        header.end()?;
        let mut body = Fields::new(expect(root.element("xbemsg:body"), "xbemsg:body")?)?;
        let message = body.any()?;
        body.end()?;
        root.end()?;
        Ok(Message {
            header: read,
            body: self::read(message)?,
        })
    }
}

fn named(name: &str, text: &str) -> Element {
    Element {
        name: name.into(),
        content: xml::Content::Text(text.into()),
    }
}

fn wrap(name: &str, elements: Vec<Element>) -> Element {
    Element {
        name: name.into(),
        content: xml::Content::Elements(elements),
    }
}

fn expect(element: Option<Element>, name: &'static str) -> Result<Element, Error> {
    match element {
        Some(element) if element.name == name => Ok(element),
        _ => Err(Error::Missing(name, "the message".into())),
    }
}

fn write(body: &Body) -> Element {
    let mut fields = Vec::new();
    let name = match body {
        Body::Certificate(pem) => return leaf("Certificate", pem),
        Body::ReservationRequest {
            name,
            from,
            duration_s,
            cpus,
            memory_bytes,
            disk_bytes,
        } => {
            fields.extend(name.as_ref().map(|name| leaf("Name", name)));
            fields.extend(from.map(|from| leaf("From", from)));
            fields.push(leaf("DurationSeconds", duration_s));
            fields.push(leaf("CPUs", cpus));
            fields.push(leaf("MemoryBytes", memory_bytes));
            fields.push(leaf("DiskBytes", disk_bytes));
            "ReservationRequest"
        }
        Body::ReservationResponse { ticket, task } => {
            fields.extend([leaf("Ticket", ticket), leaf("TaskID", task)]);
            "ReservationResponse"
        }
        Body::ConfirmReservation { ticket, job, start } => {
            fields.extend([leaf("Ticket", ticket), leaf("Job", job)]);
            fields.push(leaf("Start", start));
            "ConfirmReservation"
        }
        Body::StartRequest { ticket } => {
            fields.push(leaf("Ticket", ticket));
            "StartRequest"
        }
        Body::StatusRequest { task } => {
            fields.extend(task.map(|task| leaf("TaskID", task)));
            "StatusRequest"
        }
        Body::StatusList(tasks) => {
            fields.extend(tasks.iter().map(write_task));
            "StatusList"
        }
        Body::TerminateRequest { task, reason } => {
            fields.push(leaf("TaskID", task));
            fields.extend(reason.as_ref().map(|reason| leaf("Reason", reason)));
            "TerminateRequest"
        }
        Body::CacheFile { uri, digest } => {
            fields.push(leaf("URI", uri));
            fields.extend(digest.as_ref().map(|digest| leaf("Digest", digest)));
            "CacheFile"
        }
        Body::CacheRemove { entry } => {
            fields.push(leaf("Entry", entry));
            "CacheRemove"
        }
        Body::ListCache => "ListCache",
        Body::CacheEntries(entries) => {
            fields.extend(entries.iter().map(|entry| {
                let mut fields = vec![leaf("Entry", &entry.entry), leaf("URI", &entry.uri)];
                fields.push(leaf("SizeBytes", entry.size_bytes));
                node("CacheEntry", fields)
            }));
            "CacheEntries"
        }
        Body::Connect { connection } => {
            fields.push(leaf("Connection", connection));
            "Connect"
        }
        Body::Data {
            connection,
            offset,
            bytes,
        } => {
            fields.extend([leaf("Connection", connection), leaf("Offset", offset)]);
            fields.push(leaf("Bytes", base64::encode_block(bytes)));
            "Data"
        }
        Body::Taken { connection, offset } => {
            fields.extend([leaf("Connection", connection), leaf("Offset", offset)]);
            "Taken"
        }
        Body::End { connection, offset } => {
            fields.extend([leaf("Connection", connection), leaf("Offset", offset)]);
            "End"
        }
        Body::Reset { connection, reason } => {
            fields.extend([leaf("Connection", connection), leaf("Reason", reason)]);
            "Reset"
        }
        Body::Offer {
            task,
            owner,
            request,
        } => {
            fields.extend([leaf("TaskID", task), leaf("Owner", owner)]);
            fields.push(leaf("Request", request));
            "Offer"
        }
        Body::Error { fault, text } => {
            fields.extend([leaf("Code", fault.code()), leaf("Name", fault.name())]);
            fields.push(leaf("Text", text));
            "Error"
        }
    };
    node(name, fields)
}

fn write_task(task: &TaskState) -> Element {
    let mut fields = vec![leaf("TaskID", task.task), leaf("State", &task.state)];
    fields.extend(task.substate.as_ref().map(|text| leaf("SubState", text)));
    fields.extend(task.exit_code.map(|code| leaf("ExitCode", code)));
    fields.extend(task.reason.as_ref().map(|text| leaf("Reason", text)));
    node("Task", fields)
}

fn read(element: Element) -> Result<Body, Error> {
    let name = element.name.clone();
    if name == "xbe:Certificate" {
        return match element.content {
            xml::Content::Text(pem) => Ok(Body::Certificate(pem)),
            xml::Content::Elements(_) => Err(Error::Value("xbe:Certificate")),
        };
    }
    let mut fields = Fields::new(element)?;
    let body = match name.as_str() {
        "xbe:ReservationRequest" => Body::ReservationRequest {
            name: fields.optional("xbe:Name")?,
            from: fields.optional_value("xbe:From")?,
            duration_s: fields.value("xbe:DurationSeconds")?,
            cpus: fields.value("xbe:CPUs")?,
            memory_bytes: fields.value("xbe:MemoryBytes")?,
            disk_bytes: fields.value("xbe:DiskBytes")?,
        },
        "xbe:ReservationResponse" => Body::ReservationResponse {
            ticket: fields.text("xbe:Ticket")?,
            task: fields.value("xbe:TaskID")?,
        },
        "xbe:ConfirmReservation" => Body::ConfirmReservation {
            ticket: fields.text("xbe:Ticket")?,
            job: fields.text("xbe:Job")?,
            start: fields.value("xbe:Start")?,
        },
        "xbe:StartRequest" => Body::StartRequest {
            ticket: fields.text("xbe:Ticket")?,
        },
        "xbe:StatusRequest" => Body::StatusRequest {
            task: fields.optional_value("xbe:TaskID")?,
        },
        "xbe:StatusList" => {
            let mut tasks = Vec::new();
            while let Some(task) = fields.element("xbe:Task") {
                let mut fields = Fields::new(task)?;
                tasks.push(TaskState {
                    task: fields.value("xbe:TaskID")?,
                    state: fields.text("xbe:State")?,
                    substate: fields.optional("xbe:SubState")?,
                    exit_code: fields.optional_value("xbe:ExitCode")?,
                    reason: fields.optional("xbe:Reason")?,
                });
                fields.end()?;
            }
            Body::StatusList(tasks)
        }
        "xbe:TerminateRequest" => Body::TerminateRequest {
            task: fields.value("xbe:TaskID")?,
            reason: fields.optional("xbe:Reason")?,
        },
        "xbe:CacheFile" => Body::CacheFile {
            uri: fields.text("xbe:URI")?,
            digest: fields.optional("xbe:Digest")?,
        },
        "xbe:CacheRemove" => Body::CacheRemove {
            entry: fields.text("xbe:Entry")?,
        },
        "xbe:ListCache" => Body::ListCache,
        "xbe:CacheEntries" => {
            let mut entries = Vec::new();
            while let Some(entry) = fields.element("xbe:CacheEntry") {
                let mut fields = Fields::new(entry)?;
                entries.push(CacheEntry {
                    entry: fields.text("xbe:Entry")?,
                    uri: fields.text("xbe:URI")?,
                    size_bytes: fields.value("xbe:SizeBytes")?,
                });
                fields.end()?;
            }
            Body::CacheEntries(entries)
        }
        "xbe:Connect" => Body::Connect {
            connection: fields.value("xbe:Connection")?,
        },
        "xbe:Data" => Body::Data {
            connection: fields.value("xbe:Connection")?,
            offset: fields.value("xbe:Offset")?,
            bytes: base64::decode_block(&fields.text("xbe:Bytes")?)
                .map_err(|_| Error::Value("xbe:Bytes"))?,
        },
        "xbe:Taken" => Body::Taken {
            connection: fields.value("xbe:Connection")?,
            offset: fields.value("xbe:Offset")?,
        },
        "xbe:End" => Body::End {
            connection: fields.value("xbe:Connection")?,
            offset: fields.value("xbe:Offset")?,
        },
        "xbe:Reset" => Body::Reset {
            connection: fields.value("xbe:Connection")?,
            reason: fields.text("xbe:Reason")?,
        },
        "xbe:Offer" => Body::Offer {
            task: fields.value("xbe:TaskID")?,
            owner: fields.text("xbe:Owner")?,
            request: fields.text("xbe:Request")?,
        },
        "xbe:Error" => {
            let code: u16 = fields.value("xbe:Code")?;
            let name = fields.text("xbe:Name")?;
            let fault = Fault::ALL
                .iter()
                .copied()
                .find(|fault| fault.code() == code && fault.name() == name);
            Body::Error {
                fault: fault.ok_or(Error::Value("xbe:Code"))?,
                text: fields.text("xbe:Text")?,
            }
        }
        _ => return Err(Error::Unknown(name)),
    };
    fields.end()?;
    Ok(body)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn text() -> impl Strategy<Value = String> {
        let c = prop_oneof![
            proptest::char::range(' ', '\u{2ff}'),
            Just('\r'),
            Just('\n'),
            Just('\t'),
            proptest::char::range('\u{10000}', '\u{10fff}'),
        ];
        proptest::collection::vec(c, 0..20).prop_map(|all| all.into_iter().collect())
    }

    fn uuid() -> impl Strategy<Value = Uuid> {
        any::<u128>().prop_map(Uuid::from_u128)
    }

    fn millis() -> impl Strategy<Value = Millis> {
        (0..=Millis::MAX.get()).prop_map(Millis)
    }

    fn body() -> impl Strategy<Value = Body> {
        use proptest::option::of;
        let state = proptest::sample::select(vec!["Pending", "Running", "Cancelled"]);
        let task = (uuid(), state, of(text()), of(any::<i32>()), of(text())).prop_map(
            |(task, state, substate, exit_code, reason)| TaskState {
                task,
                state: state.into(),
                substate,
                exit_code,
                reason,
            },
        );
        let entry =
            (text(), text(), any::<u64>()).prop_map(|(entry, uri, size_bytes)| CacheEntry {
                entry,
                uri,
                size_bytes,
            });
        prop_oneof![
            text().prop_map(Body::Certificate),
            (
                of(text()),
                of(millis()),
                any::<u64>(),
                any::<u32>(),
                any::<u64>(),
                any::<u64>()
            )
                .prop_map(
                    |(name, from, duration_s, cpus, memory_bytes, disk_bytes)| {
                        Body::ReservationRequest {
                            name,
                            from,
                            duration_s,
                            cpus,
                            memory_bytes,
                            disk_bytes,
                        }
                    }
                ),
            (text(), uuid()).prop_map(|(ticket, task)| Body::ReservationResponse { ticket, task }),
            (text(), text(), any::<bool>())
                .prop_map(|(ticket, job, start)| Body::ConfirmReservation { ticket, job, start }),
            text().prop_map(|ticket| Body::StartRequest { ticket }),
            of(uuid()).prop_map(|task| Body::StatusRequest { task }),
            proptest::collection::vec(task, 0..4).prop_map(Body::StatusList),
            (uuid(), of(text())).prop_map(|(task, reason)| Body::TerminateRequest { task, reason }),
            (text(), of(text())).prop_map(|(uri, digest)| Body::CacheFile { uri, digest }),
            text().prop_map(|entry| Body::CacheRemove { entry }),
            Just(Body::ListCache),
            proptest::collection::vec(entry, 0..4).prop_map(Body::CacheEntries),
            uuid().prop_map(|connection| Body::Connect { connection }),
            (
                uuid(),
                any::<u64>(),
                proptest::collection::vec(any::<u8>(), 0..20)
            )
                .prop_map(|(connection, offset, bytes)| Body::Data {
                    connection,
                    offset,
                    bytes
                }),
            (uuid(), any::<u64>())
                .prop_map(|(connection, offset)| Body::Taken { connection, offset }),
            (uuid(), any::<u64>())
                .prop_map(|(connection, offset)| Body::End { connection, offset }),
            (uuid(), text()).prop_map(|(connection, reason)| Body::Reset { connection, reason }),
            (uuid(), text(), text()).prop_map(|(task, owner, request)| Body::Offer {
                task,
                owner,
                request
            }),
            (proptest::sample::select(Fault::ALL), text())
                .prop_map(|(fault, text)| Body::Error { fault, text }),
        ]
    }

    fn message() -> impl Strategy<Value = Message> {
        let header = (
            text(),
            text(),
            uuid(),
            proptest::option::of(uuid()),
            millis(),
            uuid(),
            any::<u64>(),
            proptest::option::of(uuid()),
        );
        (header, body()).prop_map(
            |((to, from, id, answers, time, stream, sequence, member), body)| Message {
                header: Header {
                    to,
                    from,
                    id,
                    answers,
                    time,
                    stream,
                    sequence,
                    member,
                },
                body,
            },
        )
    }

    pub(crate) fn sample(body: Body) -> Message {
        Message {
            header: Header {
                to: "CN=xbed".into(),
                from: "CN=client".into(),
                id: Uuid::from_u128(1),
                answers: None,
                time: Millis(1_767_323_045_678),
                stream: Uuid::from_u128(2),
                sequence: 1,
                member: None,
            },
            body,
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(message in message()) {
            let xml = message.to_xml().unwrap();
            prop_assert_eq!(Message::from_xml(&xml).unwrap(), message);
        }

        #[test]
        fn strange_bytes_are_refused_without_panic(text in "(<[a-z:/&;!\\[\\]=\"' ]*>?|.){0,40}") {
            prop_assert!(Message::from_xml(text.as_bytes()).is_err());
        }
    }

    /// Whether xmllint says that the documents are valid; `None` without it.
    fn valid(documents: &[Vec<u8>]) -> Option<bool> {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("xmllint");
        let schema = concat!(env!("CARGO_MANIFEST_DIR"), "/schema/xbe-messages.xsd");
        command.args(["--nonet", "--noout", "--schema", schema]);
        for (n, document) in documents.iter().enumerate() {
            let path = dir.path().join(format!("{n}.xml"));
            std::fs::File::create(&path)
                .unwrap()
                .write_all(document)
                .unwrap();
            command.arg(path);
        }
        match command.stderr(Stdio::piped()).output() {
            Err(error) => {
                println!("skipped: xmllint: {error}");
                None
            }
            Ok(output) => {
                println!("{}", String::from_utf8_lossy(&output.stderr));
                Some(output.status.success())
            }
        }
    }

    #[test]
    fn what_is_written_is_as_the_schema_says() {
        use proptest::strategy::ValueTree;
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let documents: Vec<_> = (0..200)
            .map(|_| {
                message()
                    .new_tree(&mut runner)
                    .unwrap()
                    .current()
                    .to_xml()
                    .unwrap()
            })
            .collect();
        let Some(all) = valid(&documents) else { return };
        assert!(all);
        let one = String::from_utf8(sample(Body::ListCache).to_xml().unwrap()).unwrap();
        for (from, to) in [
            ("<xbe:ListCache></xbe:ListCache>", "<xbe:Other/>"),
            ("<xbe:ListCache></xbe:ListCache>", ""),
            ("<xbe:Sequence>1", "<xbe:Sequence>x"),
            ("<xbe:Time>2026", "<xbe:Time>Monday"),
        ] {
            let bad = one.replace(from, to);
            assert_ne!(bad, one);
            assert_eq!(valid(&[bad.clone().into()]), Some(false), "{bad}");
            assert!(Message::from_xml(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_no_message_is_refused_and_the_error_says_why() {
        let xml = String::from_utf8(sample(Body::ListCache).to_xml().unwrap()).unwrap();
        let list = "<xbe:ListCache></xbe:ListCache>";
        let twice = list.repeat(2);
        let deep = "<xbe:A>".repeat(9) + &"</xbe:A>".repeat(9);
        for (from, to, expected) in [
            (
                "<xbemsg:message",
                "<!DOCTYPE a [<!ENTITY b \"c\">]><xbemsg:message",
                "a document type where none",
            ),
            ("CN=xbed", "&b;", "entity 'b'"),
            ("CN=xbed", "&#0;", "not well-formed"),
            ("CN=xbed", "&#1;", "character U+0001"),
            ("CN=xbed", "\u{1}", "character U+0001"),
            (list, "<xbe:ListCache a='b'/>", "attribute 'a'"),
            (
                list,
                "<xbe:ListCache><xbe:More/></xbe:ListCache>",
                "unexpected element 'xbe:More'",
            ),
            (list, "<ListCache/>", "unexpected element 'ListCache'"),
            (
                list,
                "<o:ListCache xmlns:o='urn:other'/>",
                "unexpected element 'o:ListCache'",
            ),
            (list, "<xbe:Error/>", "xbe:Code is missing in 'xbe:Error'"),
            (
                list,
                "<xbe:Error><xbe:Code>503</xbe:Code><xbe:Name>OK</xbe:Name></xbe:Error>",
                "value of 'xbe:Code'",
            ),
            (list, "<?php?>", "a processing instruction where none"),
            (list, twice.as_str(), "unexpected element 'xbe:ListCache'"),
            (list, "", "a message is missing"),
            (list, deep.as_str(), "too many elements, or too deep"),
            ("<xbemsg:to>", "text<xbemsg:to>", "text between elements"),
            ("</xbemsg:message>", "</xbemsg:message>x", "text outside"),
            ("</xbemsg:message>", "", "the end where none"),
            ("03:04:05.678Z", "03:04:05Z", "value of 'xbe:Time'"),
            ("2026-01-02", "2026-02-30", "value of 'xbe:Time'"),
        ] {
            let bad = xml.replace(from, to);
            assert_ne!(bad, xml, "{from}");
            let error = Message::from_xml(bad.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{bad}: {error}");
        }
        let large = vec![b' '; MAX_MESSAGE_BYTES + 1];
        assert!(matches!(Message::from_xml(&large), Err(Error::Large(_))));
        let odd = sample(Body::StartRequest {
            ticket: "\0".into(),
        });
        assert!(matches!(odd.to_xml(), Err(Error::Character(0, _))));
    }
}
