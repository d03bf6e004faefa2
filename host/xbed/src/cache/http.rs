//! The cache's part of the API.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::Response;
use futures::stream;
use tokio::sync::watch;
use xbee_api::{CacheEntry, CacheNews, CacheRequest, ErrorBody, Progress, chain};

use super::Asked;
use crate::command::{Caller, CommandError, Commands};
use crate::http::{Answer, Path, body, streaming};

/// Shortest time between two pieces of news.
const NEWS_INTERVAL: Duration = Duration::from_millis(100);

/// `GET /v1/cache`.
pub async fn list(State(commands): State<Commands>, caller: Caller) -> Json<Vec<CacheEntry>> {
    Json(commands.cached(caller))
}

/// `DELETE /v1/cache/{id}`.
pub async fn remove(
    State(commands): State<Commands>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    commands.uncache(caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/cache`: lines of [`CacheNews`], the last of which is the entry or an error. Who hangs up does not want it any
/// more.
pub async fn add(
    State(commands): State<Commands>,
    caller: Caller,
    request: Result<Json<CacheRequest>, JsonRejection>,
) -> Answer<Response> {
    let asked = commands.cache(caller, body(request)?).await?;
    let (uri, progress) = match &asked {
        Asked::Here(_) => (String::new(), None),
        Asked::Coming(waiter) => (waiter.uri().to_owned(), Some(waiter.progress())),
    };
    let news = News {
        commands,
        asked,
        uri,
        progress,
        over: false,
    };
    let lines = stream::unfold(news, |mut news| async move {
        let mut line = serde_json::to_vec(&news.next().await?).unwrap_or_default();
        line.push(b'\n');
        Some((Ok::<_, std::io::Error>(line), news))
    });
    Ok(streaming("application/x-ndjson", Body::from_stream(lines)))
}

/// What is told to who has asked for a file.
struct News {
    commands: Commands,
    asked: Asked,
    /// Without credentials.
    uri: String,
    progress: Option<watch::Receiver<xbee_staging::Progress>>,
    over: bool,
}

impl News {
    async fn next(&mut self) -> Option<CacheNews> {
        if self.over {
            return None;
        }
        let moved = async {
            tokio::time::sleep(NEWS_INTERVAL).await;
            if let Some(seen) = &mut self.progress
                && seen.changed().await.is_ok()
            {
                return *seen.borrow_and_update();
            }
            // Only the end is still to come.
            std::future::pending().await
        };
        let ended = async {
            if let Asked::Coming(waiter) = &self.asked {
                // Told below.
                let _ = waiter.ended().await;
            }
        };
        tokio::select! {
            biased;
            () = ended => {}
            moved = moved => return Some(CacheNews::Progress(Progress {
                what: self.uri.clone(),
                done_bytes: moved.transferred_bytes,
                total_bytes: moved.total_bytes,
            })),
        }
        let ended = self.commands.settle(&self.asked).await;
        self.over = true;
        Some(match ended {
            Ok(entry) => CacheNews::Entry(entry),
            Err(error) => CacheNews::Error(error_body(&error)),
        })
    }
}

fn error_body(error: &CommandError) -> ErrorBody {
    ErrorBody {
        code: error.code().into(),
        message: chain(error),
    }
}
