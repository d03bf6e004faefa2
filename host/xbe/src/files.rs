//! Files of this machine, for an `xbed` on another: what a job takes is sent before it is submitted, and what it makes is
//! fetched when it is over.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use url::Url;
use uuid::Uuid;
use xbee_api::client::Client;
use xbee_api::{CreationFlag, ResultFile, SubmitRequest, TaskStatus};
use xbee_jsdl::limits::MAX_SWEEP_JOBS;
use xbee_jsdl::{InstanceSource, Job, Options, sweep};
use xbee_staging::{Creation, Identity, Limits, PutRequest, Scheme, Stager, Uri};

use crate::cli;
use crate::error::Error;
use crate::follow::Patience;
use crate::term::{self, Progress, note};

/// How often a terminal is told of a transfer's progress.
const REFRESH: Duration = Duration::from_millis(250);

/// The `file:` URIs of a document.
#[derive(Debug, Default)]
pub struct Files {
    sources: BTreeSet<String>,
    targets: BTreeSet<String>,
}

impl Files {
    /// Those of a document that is for an `xbed` on another machine; for one on this, they are its own. None of a document
    /// that cannot be read: `xbed` says what is wrong with it.
    pub fn of(client: &Client, request: &SubmitRequest) -> Files {
        let mut files = Files::default();
        if !client.is_remote() {
            return files;
        }
        let (document, lenient) = (request.jsdl.as_bytes(), request.lenient);
        let options = Options { lenient };
        match sweep::expand(document, &options, MAX_SWEEP_JOBS) {
            Ok(None) => {
                let parsed = xbee_jsdl::parse(document, &options);
                parsed.iter().for_each(|parsed| files.add(&parsed.job));
            }
            Ok(Some(sweep)) => {
                let members = sweep.jobs().flatten();
                members.for_each(|member| files.add(&member.parsed.job));
            }
            Err(_) => {}
        }
        files
    }

    fn add(&mut self, job: &Job) {
        let mut sources = vec![];
        if let Some(instance) = &job.instance {
            match &instance.source {
                InstanceSource::Package(package) => sources.push(package),
                InstanceSource::Instance(parts) => {
                    sources.extend([&parts.kernel, &parts.image]);
                    sources.extend(&parts.initrd);
                }
            }
            sources.extend(instance.scripts.iter().map(|script| &script.location));
        }
        sources.extend(job.staging.iter().filter_map(|file| file.source.as_ref()));
        let sources = sources.into_iter().map(|location| &location.uri);
        self.sources
            .extend(sources.filter(|uri| is_file(uri)).cloned());
        let targets = job.staging.iter().filter_map(|file| file.target.as_ref());
        self.targets
            .extend(targets.filter(|uri| is_file(uri)).cloned());
    }

    /// Tells `xbed` whose files they are. An older one, which would not understand it, hears of it only if there are any.
    pub fn announce(&self, request: &mut SubmitRequest) {
        request.client_files = !self.sources.is_empty() || !self.targets.is_empty();
    }

    /// Sends what a request needs, each file once, and says so in it.
    pub async fn send(
        &self,
        client: &Client,
        request: &mut SubmitRequest,
        progress: &Progress,
    ) -> Result<(), Error> {
        self.announce(request);
        // All are looked at before the first is sent.
        let mut paths = vec![];
        for text in &self.sources {
            let path = path_of(&text.parse()?)?;
            open(&path).await?;
            paths.push((text, path));
        }
        for (text, path) in paths {
            let sent = send(client, &path, progress).await;
            progress.clear();
            match sent {
                Ok(id) => drop(request.uploads.insert(text.clone(), id)),
                Err(error) => {
                    take_back(client, &request.uploads).await;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Fetches what is kept of a task, and of an array's, if anything is.
    pub async fn fetch(
        &self,
        client: &Client,
        task: &TaskStatus,
        progress: &Progress,
    ) -> Result<(), Error> {
        if self.targets.is_empty() {
            return Ok(());
        }
        let fetched = fetch(client, task, To::Named(&self.targets), progress, |_| Ok(())).await;
        if fetched.is_err() {
            let id = task.id;
            note(format_args!(
                "task {id} keeps its results: `xbe fetch {id}` tries again"
            ));
        }
        fetched
    }
}

/// Submits a request whose files have been sent.
pub async fn submit(client: &Client, request: &SubmitRequest) -> Result<TaskStatus, Error> {
    match client.submit(request).await {
        Ok(task) => Ok(task),
        Err(error) => {
            take_back(client, &request.uploads).await;
            Err(error.into())
        }
    }
}

/// Has `xbed` remove what was sent in vain. What it does not hear goes by itself after an hour, and what a task uses stays.
pub async fn take_back(client: &Client, uploads: &BTreeMap<String, Uuid>) {
    for id in uploads.values() {
        if client
            .remove_upload(*id)
            .await
            .is_err_and(|error| error.is_transient())
        {
            break;
        }
    }
}

fn is_file(uri: &str) -> bool {
    uri.parse::<Uri>()
        .is_ok_and(|uri| uri.scheme() == Scheme::File)
}

fn path_of(uri: &Uri) -> Result<PathBuf, Error> {
    // Parsing has made sure that there is one.
    uri.file_path().ok_or_else(|| Error::NotAFile {
        path: uri.to_string().into(),
    })
}

/// Opens a file that is sent, and its length.
async fn open(path: &Path) -> Result<(tokio::fs::File, u64), Error> {
    let unreadable = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    // Looked at first: to open a pipe waits for its other end.
    let meta = tokio::fs::metadata(path).await.map_err(unreadable)?;
    if !meta.is_file() {
        let path = path.to_owned();
        return Err(Error::NotAFile { path });
    }
    let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
    Ok((file, meta.len()))
}

async fn send(client: &Client, path: &Path, progress: &Progress) -> Result<Uuid, Error> {
    let (file, bytes) = open(path).await?;
    let (sender, sent) = watch::channel(0);
    let mut sending = std::pin::pin!(client.upload(file, bytes, sender));
    let mut refresh = tokio::time::interval(REFRESH);
    let what = path.display().to_string();
    loop {
        tokio::select! {
            upload = &mut sending => return Ok(upload?.id),
            _ = refresh.tick() => progress.transfer(&what, *sent.borrow(), Some(bytes)),
        }
    }
}

/// Where results go.
enum To<'a> {
    /// Where they say, if it is among these: another machine has no say in what is written here.
    Named(&'a BTreeSet<String>),
    /// Where they say.
    Told,
    /// To a directory, by their names.
    Directory(PathBuf),
}

/// `fetch`.
pub async fn fetch_command(client: &Client, args: &cli::Fetch) -> Result<u8, Error> {
    let task = client.status(&args.task).await?;
    if !task.state.is_final() {
        return Err(Error::NotOver { task: task.id });
    }
    let to = match &args.to {
        Some(directory) => To::Directory(directory.clone()),
        None => To::Told,
    };
    let mut count = 0;
    let progress = Progress::new(true);
    fetch(client, &task, to, &progress, |path| {
        count += 1;
        term::out(path.display())
    })
    .await?;
    if count == 0 {
        note(format_args!("task {} keeps no results", task.id));
    }
    Ok(0)
}

async fn fetch(
    client: &Client,
    task: &TaskStatus,
    to: To<'_>,
    progress: &Progress,
    mut done: impl FnMut(&Path) -> Result<(), Error>,
) -> Result<(), Error> {
    let id = task.id.to_string();
    let tasks = match task.array {
        Some(_) => client.list_array(&id, true).await?,
        None => vec![task.clone()],
    };
    let mut patience = Patience::default();
    for task in tasks {
        let id = task.id.to_string();
        for result in patience.ask(|| client.results(&id)).await? {
            let number = task.member.as_ref().map(|member| member.number);
            let (uri, creation) = destination(&to, number, &result)?;
            let path = path_of(&uri)?;
            let fetched = fetch_one(client, &id, &result, &path, progress).await;
            progress.clear();
            put(uri, fetched?.path(), creation).await?;
            done(&path)?;
        }
    }
    Ok(())
}

fn destination(
    to: &To<'_>,
    number: Option<u32>,
    result: &ResultFile,
) -> Result<(Uri, Creation), Error> {
    let creation = match result.creation {
        CreationFlag::Overwrite => Creation::Overwrite,
        CreationFlag::Append => Creation::Append,
        CreationFlag::DontOverwrite => Creation::DontOverwrite,
    };
    match to {
        To::Named(targets) if !targets.contains(&result.uri) => Err(Error::ForeignTarget {
            uri: term::clean_line(&result.uri),
        }),
        To::Named(_) | To::Told => Ok((result.uri.parse()?, creation)),
        To::Directory(directory) => {
            let said = path_of(&result.uri.parse()?)?;
            let name = said.file_name().unwrap_or_default();
            let mut path = absolute(directory)?;
            if let Some(number) = number {
                path.push(number.to_string());
                std::fs::create_dir_all(&path).map_err(|source| Error::Write {
                    path: path.clone(),
                    source,
                })?;
            }
            path.push(name);
            let uri = Url::from_file_path(&path).map_err(|()| Error::NotAFile { path })?;
            Ok((uri.as_str().parse()?, Creation::DontOverwrite))
        }
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|source| Error::System {
        action: "find out the current directory",
        source,
    })
}

/// Fetches a result to a file beside the place it is for, which goes when it is dropped.
async fn fetch_one(
    client: &Client,
    task: &str,
    result: &ResultFile,
    path: &Path,
    progress: &Progress,
) -> Result<tempfile::NamedTempFile, Error> {
    let failed = |source| Error::Write {
        path: path.to_owned(),
        source,
    };
    let parent = path.parent().filter(|parent| parent.is_dir());
    let parent = parent.ok_or_else(|| Error::NoDirectory {
        path: path.to_owned(),
    })?;
    let mut new = tempfile::Builder::new()
        .prefix(".xbe-fetch-")
        .tempfile_in(parent)
        .map_err(failed)?;
    let what = path.display().to_string();
    let mut patience = Patience::default();
    let mut from = 0;
    while from < result.bytes {
        let asked = || client.result(task, result.number, from);
        let mut bytes = patience.ask(asked).await?;
        // A broken stream is asked for again from where it broke.
        let is_over = loop {
            match patience.bear(bytes.next().await).await? {
                Some(Some(data)) => {
                    from += data.len() as u64;
                    if from > result.bytes {
                        break true;
                    }
                    new.write_all(&data).map_err(failed)?;
                    progress.transfer(&what, from, Some(result.bytes));
                }
                Some(None) => break true,
                None => break false,
            }
        };
        if is_over && from != result.bytes {
            return Err(Error::WrongLength {
                uri: term::clean_line(&result.uri),
                bytes: result.bytes,
                got: from,
            });
        }
    }
    new.flush().map_err(failed)?;
    Ok(new)
}

/// Puts a fetched result where it belongs, whole or not at all, as `xbed` does on its own host.
async fn put(uri: Uri, source: &Path, creation: Creation) -> Result<(), Error> {
    let request = PutRequest {
        uri,
        source: source.to_owned(),
        creation,
        identity: Identity::current(),
        repeatable: None,
    };
    let progress = watch::Sender::default();
    let stager = Stager::new(Limits::default());
    stager
        .put(request, progress, &CancellationToken::new())
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(to: &To<'_>, number: Option<u32>, uri: &str) -> Result<PathBuf, Error> {
        let result = ResultFile {
            number: 0,
            uri: uri.to_owned(),
            creation: CreationFlag::Overwrite,
            bytes: 0,
        };
        destination(to, number, &result).and_then(|(uri, _)| path_of(&uri))
    }

    #[test]
    fn another_machine_has_no_say_in_what_is_written_here() {
        let targets = BTreeSet::from(["file:///a/b".to_owned()]);
        let named = To::Named(&targets);
        let said = place(&named, None, "file:///a/b").unwrap();
        assert_eq!(said, Path::new("/a/b"));
        for uri in ["file:///a/../a/b", "file:///etc/passwd", "file:///a/B"] {
            let error = place(&named, None, uri).unwrap_err();
            assert_eq!(error.code(), "foreign-target", "{uri}");
        }
        let directory = tempfile::tempdir().unwrap();
        let to = To::Directory(directory.path().to_owned());
        for uri in [
            "file:///a/b",
            "file:///../b",
            "file:///a/..%2f..%2fb",
            "file:///a%2fb",
        ] {
            let path = place(&to, None, uri).unwrap();
            assert_eq!(path, directory.path().join("b"), "{uri}");
        }
        let path = place(&to, Some(7), "file:///a/b").unwrap();
        assert_eq!(path, directory.path().join("7/b"));
        for uri in ["http://h/b", "b"] {
            place(&to, None, uri).unwrap_err();
        }
    }
}
