//! The header of a vsock packet (virtio 1.2, section 5.10.6, `struct virtio_vsock_hdr`).

/// Length of an encoded header in bytes.
pub const HEADER_LEN: usize = 44;

/// Context identifier of the host (virtio 1.2, section 5.10.4).
pub const HOST_CID: u32 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type offered here.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the flag receives no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the flag sends no more data.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions are over.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `VIRTIO_VSOCK_OP_*`.
pub mod op {
    #![allow(missing_docs)] // the names are the standard's
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A decoded packet header; all fields little-endian on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Context identifier of the sender.
    pub src_cid: u64,
    /// Context identifier of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Payload length in bytes.
    pub len: u32,
    /// Socket type, see [`TYPE_STREAM`].
    pub kind: u16,
    /// Operation, see [`op`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Receive buffer of the sender in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of that buffer so far (wraps).
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes a header. Every bit pattern is a header; judging it is the caller's part.
    pub fn decode(b: &[u8; HEADER_LEN]) -> Self {
        let u64_at = |i: usize| {
            u64::from_le_bytes([
                b[i],
                b[i + 1],
                b[i + 2],
                b[i + 3],
                b[i + 4],
                b[i + 5],
                b[i + 6],
                b[i + 7],
            ])
        };
        let u32_at = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        let u16_at = |i: usize| u16::from_le_bytes([b[i], b[i + 1]]);
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Encodes the header as it stands in a descriptor.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut b = [0; HEADER_LEN];
        b[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        b[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        b[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        b[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        b[24..28].copy_from_slice(&self.len.to_le_bytes());
        b[28..30].copy_from_slice(&self.kind.to_le_bytes());
        b[30..32].copy_from_slice(&self.op.to_le_bytes());
        b[32..36].copy_from_slice(&self.flags.to_le_bytes());
        b[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        b[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        b
    }

    /// The RST that answers a packet belonging to no connection (virtio 1.2, section 5.10.6.6).
    pub fn rst_for(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_44_bytes_survive_a_round_trip(bytes in proptest::collection::vec(any::<u8>(), HEADER_LEN)) {
            let bytes: [u8; HEADER_LEN] = bytes.try_into().unwrap();
            prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
        }
    }

    #[test]
    fn fields_stand_where_the_standard_puts_them() {
        let mut bytes = [0u8; HEADER_LEN];
        for (i, b) in bytes.iter_mut().enumerate() {
            *b = i as u8;
        }
        let h = Header::decode(&bytes);
        assert_eq!(h.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(h.dst_port, 0x1716_1514);
        assert_eq!((h.kind, h.op), (0x1d1c, 0x1f1e));
        assert_eq!(h.fwd_cnt, 0x2b2a_2928);
    }
}
