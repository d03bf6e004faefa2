//! Proof of knowing the secret of this boot: a keyed BLAKE3 hash over both sides' nonces.
//!
//! Each side's proof covers a nonce of the other side, so that none can be replayed, and a label of
//! its own, so that none can be reflected. The generations are covered too: they cannot be lowered
//! on the way.

use std::fmt;

use crate::{GuestHello, Uuid};

/// Bytes of a secret, a nonce and a proof.
pub const BYTES: usize = 32;

/// The secret that only this boot's agent and its host know. Never printed.
#[derive(Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
#[cbor(transparent)]
pub struct Secret(#[cbor(n(0), with = "minicbor::bytes")] pub [u8; BYTES]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Who proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The host manager.
    Host,
    /// The agent.
    Guest,
}

/// The proof of `side` in a handshake that began with `hello` and was answered with
/// `generation` and `host_nonce`.
pub fn prove(
    secret: &Secret,
    side: Side,
    hello: &GuestHello,
    generation: u16,
    host_nonce: &[u8; BYTES],
) -> [u8; BYTES] {
    *transcript(secret, side, hello, generation, host_nonce).as_bytes()
}

/// Whether `proof` is what [`prove`] gives; takes the same time for each answer.
pub fn verify(
    secret: &Secret,
    side: Side,
    hello: &GuestHello,
    generation: u16,
    host_nonce: &[u8; BYTES],
    proof: &[u8; BYTES],
) -> bool {
    // `blake3::Hash` compares in constant time.
    transcript(secret, side, hello, generation, host_nonce) == *proof
}

fn transcript(
    secret: &Secret,
    side: Side,
    hello: &GuestHello,
    generation: u16,
    host_nonce: &[u8; BYTES],
) -> blake3::Hash {
    let GuestHello {
        generation: offered,
        domain,
        nonce,
    } = hello;
    let label: &[u8] = match side {
        Side::Host => b"xbee agent protocol, host \0",
        Side::Guest => b"xbee agent protocol, guest\0",
    };
    // Every field has a fixed length, so the concatenation is unambiguous.
    let mut hasher = blake3::Hasher::new_keyed(&secret.0);
    hasher
        .update(label)
        .update(&offered.to_be_bytes())
        .update(&generation.to_be_bytes())
        .update(Uuid::as_bytes(domain))
        .update(nonce)
        .update(host_nonce);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_fits_one_side_one_secret_and_one_handshake() {
        let secret = Secret([7; BYTES]);
        let hello = GuestHello {
            generation: 1,
            domain: Uuid::from_u128(5),
            nonce: [1; BYTES],
        };
        let proof = prove(&secret, Side::Host, &hello, 1, &[2; BYTES]);
        assert!(verify(&secret, Side::Host, &hello, 1, &[2; BYTES], &proof));
        assert!(
            !verify(&secret, Side::Guest, &hello, 1, &[2; BYTES], &proof),
            "reflected"
        );
        assert!(!verify(
            &Secret([8; BYTES]),
            Side::Host,
            &hello,
            1,
            &[2; BYTES],
            &proof
        ));
        assert!(
            !verify(&secret, Side::Host, &hello, 0, &[2; BYTES], &proof),
            "lowered"
        );
        assert!(
            !verify(&secret, Side::Host, &hello, 1, &[3; BYTES], &proof),
            "replayed"
        );
        for changed in [
            GuestHello {
                generation: 2,
                ..hello.clone()
            },
            GuestHello {
                domain: Uuid::from_u128(6),
                ..hello.clone()
            },
            GuestHello {
                nonce: [9; BYTES],
                ..hello.clone()
            },
        ] {
            assert!(!verify(
                &secret,
                Side::Host,
                &changed,
                1,
                &[2; BYTES],
                &proof
            ));
        }
        assert_eq!(format!("{secret:?}"), "Secret(..)");
    }
}
