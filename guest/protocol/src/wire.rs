//! How foreign types are written in CBOR.

/// A UUID is a byte string of 16.
pub(crate) mod uuid {
    use minicbor::{Decoder, Encoder};
    use uuid::Uuid;

    pub(crate) fn encode<C, W: minicbor::encode::Write>(
        id: &Uuid,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.bytes(id.as_bytes())?.ok()
    }

    pub(crate) fn decode<C>(
        d: &mut Decoder<'_>,
        _: &mut C,
    ) -> Result<Uuid, minicbor::decode::Error> {
        let position = d.position();
        Uuid::from_slice(d.bytes()?)
            .map_err(|_| minicbor::decode::Error::message("a UUID has 16 bytes").at(position))
    }
}
