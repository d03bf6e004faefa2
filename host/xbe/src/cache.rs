//! `cache`: files that xbed has fetched and keeps.

use indicatif::HumanBytes;
use serde_json::json;
use xbee_api::client::Client;
use xbee_api::{CacheEntry, CacheNews, CacheRequest};

use crate::cli::{Cache, CacheAction};
use crate::error::Error;
use crate::tasks::now_ms;
use crate::term::{self, Progress};

/// `cache`.
pub async fn cache(client: &Client, args: &Cache) -> Result<u8, Error> {
    match &args.action {
        CacheAction::Add { uri, sha256, json } => {
            let request = CacheRequest {
                uri: uri.clone(),
                digest: sha256.as_ref().map(|hex| format!("sha256:{hex}")),
            };
            add(client, &request, json.json).await
        }
        CacheAction::Ls { json } => list(client, json.json).await,
        CacheAction::Rm { entries, json } => {
            for entry in entries {
                client.uncache(entry).await?;
                if json.json {
                    term::json(&json!({ "removed": entry }))?
                } else {
                    term::out(entry)?
                }
            }
            Ok(0)
        }
    }
}

async fn add(client: &Client, request: &CacheRequest, json: bool) -> Result<u8, Error> {
    let bar = Progress::new(!json);
    let mut news = client.cache(request).await?;
    let entry: CacheEntry = loop {
        match news.next().await? {
            CacheNews::Progress(progress) => {
                bar.transfer(&progress.what, progress.done_bytes, progress.total_bytes)
            }
            CacheNews::Entry(entry) => break entry,
            // Turned into an error by the client.
            CacheNews::Error(_) => {}
        }
    };
    bar.stop();
    if json {
        term::json(&entry)?
    } else {
        term::out(entry.id)?
    }
    Ok(0)
}

async fn list(client: &Client, json: bool) -> Result<u8, Error> {
    let entries = client.cached().await?;
    if json {
        term::json(&entries)?;
        return Ok(0);
    }
    let now_ms = now_ms();
    let age = |at_ms: u64| term::age(now_ms.saturating_sub(at_ms));
    let header = ["ENTRY", "SIZE", "ON DISK", "FETCHED", "USED", "URI"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for entry in &entries {
        let used = if entry.in_use {
            "now".to_owned()
        } else {
            age(entry.used_ms)
        };
        rows.push(vec![
            entry.id.to_string(),
            HumanBytes(entry.size_bytes).to_string(),
            HumanBytes(entry.allocated_bytes).to_string(),
            age(entry.fetched_ms),
            used,
            term::clean_line(&entry.uri),
        ]);
    }
    term::table(&rows)?;
    Ok(0)
}
