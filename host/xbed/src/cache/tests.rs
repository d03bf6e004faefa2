use std::os::unix::fs::FileExt;

use clap::Parser;
use xbee_api::{CacheEntry, CacheRequest, SubmitRequest};
use xbee_hypervisor::sim::{SimConfig, SimHost, SimHypervisor};
use xbee_staging::{Limits, Stager};

use super::*;
use crate::command::{Caller, CommandError, Commands};
use crate::config::{Config, Options};
use crate::host::Host;
use crate::store::Owner;

const MIB: u64 = 1 << 20;

struct Bench {
    dir: tempfile::TempDir,
    host: Arc<Host>,
    commands: Commands,
}

impl Bench {
    /// A host whose cache takes so much, and on which no task ever begins.
    async fn new(max_bytes: u64) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        // For the files in it are read with the rights of other users.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let host = open(dir.path(), max_bytes).await;
        Bench {
            commands: Commands::new(host.clone()),
            host,
            dir,
        }
    }

    /// A file of so many bytes, none of them a hole, and its URI.
    fn file(&self, name: &str, bytes: u64) -> String {
        let path = self.dir.path().join(name);
        fs::write(&path, vec![b'x'; usize::try_from(bytes).unwrap()]).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        format!("file://{}", path.display())
    }

    async fn add(&self, uid: u32, uri: &str) -> Result<CacheEntry, CommandError> {
        let request = CacheRequest {
            uri: uri.into(),
            digest: None,
        };
        let asked = self.commands.cache(caller(uid), request).await?;
        self.commands.settle(&asked).await
    }

    fn files(&self) -> Vec<String> {
        let files = fs::read_dir(self.dir.path().join("data/cache")).unwrap();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    fn ids(&self) -> Vec<String> {
        let list = self.commands.cached(caller(0));
        let mut ids: Vec<String> = list.iter().map(|entry| entry.id.to_string()).collect();
        ids.sort();
        ids
    }
}

async fn open(dir: &Path, max_bytes: u64) -> Arc<Host> {
    let data = dir.join("data");
    let data = data.to_str().unwrap();
    let options = Options::parse_from(["xbed", "--backend", "sim", "--data", data]);
    let mut config = Config::load(options).unwrap();
    config.domains = 0;
    config.cache.max_bytes = max_bytes;
    let sim = SimHost::new(SimConfig::new(config.domains()));
    let hypervisor = Arc::new(SimHypervisor::new(sim));
    let host = Host::open(config, hypervisor, Stager::new(Limits::default())).await;
    host.unwrap()
}

fn caller(uid: u32) -> Caller {
    Caller {
        owner: Owner::of(uid),
    }
}

/// A job that takes a file from there.
fn job(uri: &str) -> SubmitRequest {
    SubmitRequest {
        jsdl: format!(
            r#"<j:JobDefinition xmlns:j="http://schemas.ggf.org/jsdl/2005/11/jsdl"
            xmlns:p="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix"><j:JobDescription>
            <j:Application><p:POSIXApplication><p:Executable>true</p:Executable></p:POSIXApplication></j:Application>
            <j:DataStaging><j:FileName>a</j:FileName><j:CreationFlag>overwrite</j:CreationFlag>
            <j:Source><j:URI>{uri}</j:URI></j:Source></j:DataStaging></j:JobDescription></j:JobDefinition>"#
        ),
        ..SubmitRequest::default()
    }
}

#[tokio::test]
async fn an_entry_is_its_owners_alone() {
    const ALICE: u32 = 4001;
    const BOB: u32 = 4002;
    let bench = Bench::new(64 * MIB).await;
    let file = bench.file("a", 10);
    let entry = bench.add(ALICE, &file).await.unwrap();
    assert_eq!((entry.owner, entry.size_bytes), (ALICE, 10));
    let id = entry.id.to_string();
    let seen = |uid| bench.commands.cached(caller(uid)).len();
    assert_eq!((seen(ALICE), seen(BOB), seen(0)), (1, 0, 1));
    let job = job(&format!("cache:{}", &id[..8]));
    let commands = &bench.commands;
    assert!(commands.check(caller(ALICE), job.clone()).await.accepted);
    // Root sees it, but its tasks are not the entry's owner's.
    for other in [BOB, 0] {
        let refused = commands
            .submit(caller(other), job.clone())
            .await
            .unwrap_err();
        assert_eq!(refused.code(), "cache-entry-not-found", "{refused}");
    }
    let refused = commands.uncache(caller(BOB), &id).await.unwrap_err();
    assert_eq!(refused.code(), "cache-entry-not-found");
    // The same for another user is another entry.
    let other = bench.add(BOB, &file).await.unwrap();
    assert_ne!(other.id, entry.id);
    assert_eq!(seen(0), 2);
    commands.uncache(caller(0), &id).await.unwrap();
    assert_eq!(bench.ids(), [other.id.to_string()]);
    assert_eq!(bench.files(), bench.ids());
}

#[tokio::test]
async fn a_file_of_the_host_is_not_for_users_on_other_machines() {
    let bench = Bench::new(64 * MIB).await;
    let uri = bench.file("a", 10);
    let refused = bench.add(Owner::FIRST_REMOTE, &uri).await.unwrap_err();
    assert_eq!(refused.code(), "local-file");
    assert_eq!(bench.files(), [""; 0]);
}

#[tokio::test]
async fn what_was_not_used_for_longest_goes_first_and_nothing_that_a_task_has_or_names() {
    let bench = Bench::new(3 * MIB).await;
    let mut ids = vec![];
    for name in ["linked", "named", "used", "unused"] {
        let uri = bench.file(name, MIB - 8192);
        if name == "unused" {
            let host = &bench.host;
            let link = bench.dir.path().join("link");
            assert!(host.cache.link(&host.store, ids[0], &link).unwrap());
            let job = job(&format!("cache:{}", ids[1]));
            bench.commands.submit(caller(0), job).await.unwrap();
            // Those two are the oldest now.
            for (id, used_ms) in ids.iter().zip(1..) {
                host.cache.lock().entries.get_mut(id).unwrap().used_ms = used_ms;
            }
        }
        ids.push(bench.add(0, &uri).await.unwrap().id);
    }
    let mut left = [ids[0], ids[1], ids[3]];
    left.sort();
    let left: Vec<String> = left.iter().map(Uuid::to_string).collect();
    assert_eq!(bench.ids(), left);
    assert_eq!(bench.files(), left);
    let refused = bench.commands.uncache(caller(0), &ids[1].to_string()).await;
    assert_eq!(refused.unwrap_err().code(), "cache-entry-in-use");
    // Who has the file keeps it.
    bench
        .commands
        .uncache(caller(0), &ids[0].to_string())
        .await
        .unwrap();
    let link = fs::metadata(bench.dir.path().join("link")).unwrap();
    assert_eq!(link.len(), MIB - 8192);
}

#[tokio::test]
async fn what_is_larger_than_the_cache_is_refused_and_leaves_nothing() {
    let bench = Bench::new(MIB).await;
    let small = bench.add(0, &bench.file("small", 4096)).await.unwrap();
    let refused = bench
        .add(0, &bench.file("large", 2 * MIB))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), "cache-entry-too-large", "{refused}");
    assert_eq!(bench.ids(), [small.id.to_string()]);
    assert_eq!(bench.files(), bench.ids());
    // Holes take no room.
    let uri = bench.file("sparse", 0);
    let sparse = fs::File::options()
        .write(true)
        .open(bench.dir.path().join("sparse"));
    sparse.unwrap().write_all_at(b"x", 64 * MIB).unwrap();
    let sparse = bench.add(0, &uri).await.unwrap();
    assert!(
        sparse.allocated_bytes < MIB && sparse.size_bytes > 64 * MIB,
        "{sparse:?}"
    );
}

#[tokio::test]
async fn a_digest_is_demanded() {
    let bench = Bench::new(64 * MIB).await;
    let uri = bench.file("a", 3);
    // Of "xxx".
    const RIGHT: &str = "cd2eb0837c9b4c962c22d2ff8b5441b7b45805887f051d39bf133b583baf6860";
    for (digest, code) in [
        ("cd2e".to_owned(), "invalid-hash"),
        ("sha256:12".to_owned(), "invalid-hash"),
        (format!("sha256:{}", "0".repeat(64)), "hash-mismatch"),
        (format!("SHA256:{}", RIGHT.to_uppercase()), ""),
        (format!("sha256:{RIGHT}"), ""),
    ] {
        let request = CacheRequest {
            uri: uri.clone(),
            digest: Some(digest.clone()),
        };
        let added = async {
            let asked = bench.commands.cache(caller(0), request).await?;
            bench.commands.settle(&asked).await
        };
        match added.await {
            Ok(entry) => assert_eq!((entry.sha256.as_str(), code), (RIGHT, "")),
            Err(error) => assert_eq!(error.code(), code, "{error}"),
        }
    }
    // The last two are one.
    assert_eq!(bench.ids().len(), 1);
    assert_eq!(bench.files(), bench.ids());
}

#[tokio::test]
async fn what_is_not_as_it_was_is_forgotten_at_once_and_at_the_next_start() {
    let bench = Bench::new(64 * MIB).await;
    let mut ids = vec![];
    for name in ["cut", "cut later", "gone", "whole"] {
        ids.push(bench.add(0, &bench.file(name, 100)).await.unwrap().id);
    }
    let cache = &bench.host.cache;
    let cut = |id| {
        fs::set_permissions(cache.path(id), Permissions::from_mode(0o600)).unwrap();
        let file = fs::File::options().write(true).open(cache.path(id));
        file.unwrap().set_len(99).unwrap();
    };
    cut(ids[0]);
    let refused = bench
        .commands
        .submit(caller(0), job(&format!("cache:{}", ids[0])));
    assert_eq!(refused.await.unwrap_err().code(), "cache-entry-not-found");
    assert!(!bench.ids().contains(&ids[0].to_string()));
    cut(ids[1]);
    fs::remove_file(cache.path(ids[2])).unwrap();
    fs::write(cache.path(Uuid::new_v4()), "fetched and not recorded").unwrap();
    let dir = cache.directory.clone();
    fs::write(dir.join(".xbee-stage-1-0"), "half").unwrap();
    let Bench {
        dir,
        host,
        commands,
    } = bench;
    drop((host, commands));
    let host = open(dir.path(), 64 * MIB).await;
    let commands = Commands::new(host.clone());
    let bench = Bench {
        dir,
        host,
        commands,
    };
    assert_eq!(bench.ids(), [ids[3].to_string()]);
    assert_eq!(bench.files(), bench.ids());
}

#[tokio::test]
async fn a_host_may_have_no_cache() {
    let bench = Bench::new(0).await;
    let refused = bench.add(0, &bench.file("a", 1)).await.unwrap_err();
    assert_eq!(refused.code(), "cache-off");
}
