/*
 * virtio_net_hdr: what a guest asks for with a frame, and what a guest can be told with one. virtio 1.3, 5.1.6.
 */
#ifndef XN_VNET_H
#define XN_VNET_H

#include "packet.h"
#include "view.h"

enum {
	/* Shorter segments, and more of them, are no TCP's: a chain of a guest must not become thousands of frames. */
	GSO_MIN_SIZE = 8,
	GSO_MAX_SEGMENTS = 128
};

/* enum view_need that a guest with these features may ask for, and that it takes from us. */
u8 vnet_sends(u64 features);
u8 vnet_takes(u64 features);

/* Whether a header, by its first two bytes, asks for anything. */
static inline bool vnet_asks(const u8 *hdr)
{
	return hdr[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM || hdr[1] != VIRTIO_NET_HDR_GSO_NONE;
}

/* The header as it lies in guest memory, little endian since virtio 1.0. */
static inline struct virtio_net_hdr vnet_read(const u8 *raw)
{
	struct virtio_net_hdr hdr;

	memcpy(&hdr, raw, sizeof(hdr));
	hdr.hdr_len = le16toh(hdr.hdr_len);
	hdr.gso_size = le16toh(hdr.gso_size);
	hdr.csum_start = le16toh(hdr.csum_start);
	hdr.csum_offset = le16toh(hdr.csum_offset);
	return hdr;
}

/* The 12 bytes of a header for the receiver; of the first 10 alone where there are no more. */
static inline struct virtio_net_hdr_mrg_rxbuf vnet_header(const struct view *v, u16 buffers)
{
	struct virtio_net_hdr_mrg_rxbuf h = {.hdr = v->vnet, .num_buffers = htole16(buffers)};

	h.hdr.hdr_len = htole16(h.hdr.hdr_len);
	h.hdr.gso_size = htole16(h.hdr.gso_size);
	h.hdr.csum_start = htole16(h.hdr.csum_start);
	h.hdr.csum_offset = htole16(h.hdr.csum_offset);
	return h;
}

/*
 * Judges what `hdr` asks for a frame whose first `have` bytes, all of its headers if it has any, are a snapshot at p. Fills
 * v->vnet and v->needs; or marks v dropped. hdr_len is taken from the frame, never from the guest.
 */
void vnet_judge(struct view *v, const struct virtio_net_hdr *hdr, u8 sends, const u8 *p, u32 have);

/* Bytes of headers that each of the frames gets which a frame is cut into: fragments of a datagram share its UDP header. */
static inline u32 vnet_headers(const struct view *v)
{
	return v->needs & NEED_UFO ? v->vnet.hdr_len - (u32)UDP_HDR : v->vnet.hdr_len;
}

/* How many frames of the wire a frame is. */
static inline u32 vnet_segments(const struct view *v)
{
	if (likely(!(v->needs & NEED_CUT)))
		return 1;
	return (v->len - vnet_headers(v) + v->vnet.gso_size - 1) / v->vnet.gso_size;
}

#endif
