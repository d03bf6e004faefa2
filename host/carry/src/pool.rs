//! How daemons that share a certificate and a queue share tasks: the destinations of a pool, and what is sent to them.
//!
//! A task that waits is a persistent message of one queue, sealed by the member that a user gave it to, to all. The member
//! that can start it at once exchanges it for the same message in a queue of its own, in one transaction, and takes it up
//! from there: whatever breaks off in between, the message is in one of the two queues, and in the own one only that member
//! sees it, as often as it needs until it has it.

use std::sync::Arc;

use uuid::Uuid;
use xbee_envelope::Body;
use xbee_envelope::seal::{self, Endpoint};
use xbee_mq::client::{Client, ClientError, ClientOptions};
use xbee_mq::frame::Headers;

use crate::{Address, Options};

/// A task that waits in a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Its id.
    pub task: Uuid,
    /// The subject whose it is.
    pub owner: String,
    /// What it is to do: the request of the API, in JSON.
    pub request: String,
    /// When it was offered, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Another one for each offer.
    pub id: Uuid,
}

/// Why a message is no offer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not sealed by a member, or not as it was.
    #[error("a message of the pool cannot be opened")]
    Seal(#[from] seal::Error),
    /// It is something else.
    #[error("a message of the pool is no task")]
    NoOffer,
}

/// A daemon of a pool, to the others.
#[derive(Clone)]
pub struct Member {
    address: Address,
    options: Options,
    endpoint: Arc<Endpoint>,
    id: Uuid,
}

impl Member {
    /// `id` is that of [`Endpoint::of_member`].
    pub fn new(address: Address, options: Options, endpoint: Arc<Endpoint>, id: Uuid) -> Member {
        Member {
            address,
            options,
            endpoint,
            id,
        }
    }

    /// A connection to the broker that ends when it is lost. A subscription with acknowledgement has so many messages.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn connect(&self, prefetch: usize) -> Result<Client, ClientError> {
        let options = ClientOptions {
            prefetch,
            ..self.options.client()
        };
        Client::connect_with(self.address.broker.clone(), options).await
    }

    /// The queue of tasks that wait.
    pub fn tasks(&self) -> String {
        format!("{}.tasks", self.address.destination())
    }

    /// The queue of tasks that this member has taken.
    pub fn own(&self) -> String {
        format!("{}.{}", self.address.destination(), self.id.simple())
    }

    /// The queue of messages that are no tasks.
    pub fn refused(&self) -> String {
        format!("{}.refused", self.address.destination())
    }

    /// The topic on which all members hear what one asks.
    pub fn members(&self) -> String {
        format!("/topic/xbee.members.{}", self.address.queue)
    }

    /// The headers of what must not be lost.
    pub fn persistent(&self) -> Headers {
        Headers::new().with("persistent", "true")
    }

    /// Seals a task for the pool.
    ///
    /// # Errors
    /// It is too large.
    pub async fn offer(
        &self,
        task: Uuid,
        owner: String,
        request: String,
    ) -> Result<Vec<u8>, seal::Error> {
        let body = Body::Offer {
            task,
            owner,
            request,
        };
        self.seal(body, None).await
    }

    /// Seals what members alone may read.
    ///
    /// # Errors
    /// It is too large.
    pub async fn seal(&self, body: Body, answers: Option<Uuid>) -> Result<Vec<u8>, seal::Error> {
        let endpoint = self.endpoint.clone();
        blocking(move || endpoint.seal_own(body, answers)).await
    }

    /// What another member says, and which message of its it answers.
    ///
    /// # Errors
    /// It is not from a member.
    pub async fn open(&self, sealed: Vec<u8>) -> Result<(Body, Option<Uuid>), seal::Error> {
        let endpoint = self.endpoint.clone();
        let message = blocking(move || endpoint.open_own(&sealed)).await?;
        Ok((message.body, message.header.answers))
    }

    /// Opens a task.
    ///
    /// # Errors
    /// It is none, or not from a member.
    pub async fn open_offer(&self, sealed: Vec<u8>) -> Result<Offer, Error> {
        let endpoint = self.endpoint.clone();
        let message = blocking(move || endpoint.open_own(&sealed)).await?;
        let Body::Offer {
            task,
            owner,
            request,
        } = message.body
        else {
            return Err(Error::NoOffer);
        };
        Ok(Offer {
            task,
            owner,
            request,
            at_ms: message.header.time.get(),
            id: message.header.id,
        })
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}
