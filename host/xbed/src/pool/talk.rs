//! What members of a pool ask each other: whether one of them could run a task.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use uuid::Uuid;
use xbee_carry::pool::Member;
use xbee_envelope::{Body, Fault};
use xbee_mq::client::{Client, ClientError, Received, Subscription};
use xbee_mq::frame::Headers;
use xbee_mq::session::AckMode;

use super::Pool;

/// How long the others have to say that they could.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Questions and answers that are looked at at a time; others are lost, as a topic may lose them.
const AT_A_TIME: usize = 32;
/// Longest destination that is answered to, bytes.
const MAX_DESTINATION_BYTES: usize = 255;

/// A connection over which members talk.
pub struct Talk {
    pub mq: Client,
    /// Where the others answer.
    topic: String,
    asked: Mutex<HashMap<Uuid, oneshot::Sender<()>>>,
}

impl Talk {
    /// Listens to the other members, until the connection is lost.
    pub async fn begin(pool: Arc<Pool>, mq: Client) -> Result<Arc<Talk>, ClientError> {
        let topic = format!("/topic/xbee.{}", Uuid::new_v4().simple());
        let answers = mq.subscribe(&topic, AckMode::Auto).await?;
        let questions = mq.subscribe(&pool.member.members(), AckMode::Auto).await?;
        let talk = Arc::new(Talk {
            mq,
            topic,
            asked: Mutex::default(),
        });
        tokio::spawn(listen(pool, talk.clone(), questions, answers));
        Ok(talk)
    }

    /// Whether another member says that it could run this task.
    pub async fn anybody(&self, member: &Member, offer: &[u8]) -> bool {
        let Ok(id) = member
            .open_offer(offer.to_vec())
            .await
            .map(|offer| offer.id)
        else {
            return false;
        };
        let (told, hears) = oneshot::channel();
        self.lock().insert(id, told);
        let headers = Headers::new().with("reply-to", &self.topic);
        let asked = async {
            self.mq
                .send(&member.members(), &headers, offer)
                .await
                .ok()?;
            hears.await.ok()
        };
        let answered = tokio::time::timeout(ANSWER_LIMIT, asked).await;
        self.lock().remove(&id);
        answered.is_ok_and(|answered| answered.is_some())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, oneshot::Sender<()>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn listen(
    pool: Arc<Pool>,
    talk: Arc<Talk>,
    mut questions: Subscription,
    mut answers: Subscription,
) {
    let room = Arc::new(Semaphore::new(AT_A_TIME));
    loop {
        let (message, is_question) = tokio::select! {
            message = questions.next() => (message, true),
            message = answers.next() => (message, false),
        };
        let Some(message) = message else { return };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            continue;
        };
        let (pool, talk) = (pool.clone(), talk.clone());
        tokio::spawn(async move {
            match is_question {
                true => talk.answer(&pool, message).await,
                false => talk.hear(&pool, message).await,
            }
            drop(permit);
        });
    }
}

impl Talk {
    /// Says that this host could, if it could.
    async fn answer(&self, pool: &Pool, message: Received) {
        let destination = message.headers.get("reply-to").unwrap_or_default();
        let good = destination.starts_with('/') && destination.len() <= MAX_DESTINATION_BYTES;
        if !good || destination == self.topic {
            return;
        }
        let Ok(offer) = pool.member.open_offer(message.body).await else {
            return;
        };
        if !pool.could(&offer).await {
            return;
        }
        let body = Body::Error {
            fault: Fault::Ok,
            text: "it could run here".to_owned(),
        };
        let Ok(answer) = pool.member.seal(body, Some(offer.id)).await else {
            return;
        };
        if let Err(error) = self.mq.post(destination, &Headers::new(), answer).await {
            tracing::debug!(%error, "no answer can be sent");
        }
    }

    /// Passes on what another member says.
    async fn hear(&self, pool: &Pool, message: Received) {
        let opened = pool.member.open(message.body).await;
        let Ok((
            Body::Error {
                fault: Fault::Ok, ..
            },
            Some(answers),
        )) = opened
        else {
            return;
        };
        if let Some(told) = self.lock().remove(&answers) {
            // Who asked may have given up.
            let _ = told.send(());
        }
    }
}
