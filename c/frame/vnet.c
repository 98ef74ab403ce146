#include "vnet.h"

#include <netinet/in.h>

#ifndef VIRTIO_NET_F_GUEST_USO4 /* Linux 6.2 */
#define VIRTIO_NET_F_GUEST_USO4 54
#define VIRTIO_NET_F_GUEST_USO6 55
#define VIRTIO_NET_F_HOST_USO 56
#endif
#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif

static u8 if_has(u64 features, u32 bit, u8 needs)
{
	return features >> bit & 1 ? needs : 0;
}

u8 vnet_sends(u64 features)
{
	if (!if_has(features, VIRTIO_NET_F_CSUM, 1))
		return 0;
	return NEED_CSUM | if_has(features, VIRTIO_NET_F_HOST_TSO4, NEED_TSO4) |
	       if_has(features, VIRTIO_NET_F_HOST_TSO6, NEED_TSO6) | if_has(features, VIRTIO_NET_F_HOST_ECN, NEED_ECN) |
	       if_has(features, VIRTIO_NET_F_HOST_UFO, NEED_UFO) |
	       if_has(features, VIRTIO_NET_F_HOST_USO, NEED_USO4 | NEED_USO6);
}

u8 vnet_takes(u64 features)
{
	if (!if_has(features, VIRTIO_NET_F_GUEST_CSUM, 1))
		return 0;
	return NEED_CSUM | if_has(features, VIRTIO_NET_F_GUEST_TSO4, NEED_TSO4) |
	       if_has(features, VIRTIO_NET_F_GUEST_TSO6, NEED_TSO6) |
	       if_has(features, VIRTIO_NET_F_GUEST_ECN, NEED_ECN) | if_has(features, VIRTIO_NET_F_GUEST_UFO, NEED_UFO) |
	       if_has(features, VIRTIO_NET_F_GUEST_USO4, NEED_USO4) |
	       if_has(features, VIRTIO_NET_F_GUEST_USO6, NEED_USO6);
}

/* Which of the kinds it is; 0: none that there is. */
static u8 kind_of(u8 gso_type, u8 version)
{
	switch (gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
	case VIRTIO_NET_HDR_GSO_TCPV4:
		return NEED_TSO4;
	case VIRTIO_NET_HDR_GSO_TCPV6:
		return NEED_TSO6;
	case VIRTIO_NET_HDR_GSO_UDP:
		return NEED_UFO;
	case VIRTIO_NET_HDR_GSO_UDP_L4:
		return version == 6 ? NEED_USO6 : NEED_USO4;
	default:
		return 0;
	}
}

static bool is_protocol(const struct packet *at, u8 kind)
{
	if (kind == NEED_TSO4 || kind == NEED_TSO6)
		return at->protocol == IPPROTO_TCP && at->version == (kind == NEED_TSO4 ? 4 : 6);
	return at->protocol == IPPROTO_UDP;
}

static void judge_gso(struct view *v, const struct virtio_net_hdr *hdr, u8 sends, const u8 *p, u32 have)
{
	u8 ecn = hdr->gso_type & VIRTIO_NET_HDR_GSO_ECN ? NEED_ECN : 0, kind = kind_of(hdr->gso_type, 4);
	struct packet at;

	if (!kind || !(sends & kind) || (ecn && (!(sends & NEED_ECN) || !(kind & (NEED_TSO4 | NEED_TSO6))))) {
		view_drop(v, XN_DROP_GSO_TYPE);
		return;
	}
	if (!(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)) {
		view_drop(v, XN_DROP_GSO_CSUM);
		return;
	}
	bool parsed = packet_parse(p, have, v->len, &at);

	/* An Ethernet frame of another kind, or a transport that it is not, before what is wrong with it. */
	if (at.fault == XN_DROP_L3 && at.type != ETH_P_IP && at.type != ETH_P_IPV6)
		at.fault = XN_DROP_GSO_PROTO;
	if (parsed && at.fragment)
		at.fault = XN_DROP_FRAGMENT;
	else if (parsed && !is_protocol(&at, kind))
		at.fault = XN_DROP_GSO_PROTO;
	/* Where the packet does not fill the frame, one of the two lies about what is to be cut. */
	else if (parsed && at.end != v->len)
		at.fault = XN_DROP_L3;
	else if (parsed && at.protocol == IPPROTO_UDP && load_be16(p + at.l4 + 4) != at.end - at.l4)
		at.fault = XN_DROP_L4;
	else if (parsed &&
		 (hdr->csum_start != at.l4 || hdr->csum_offset != (at.protocol == IPPROTO_TCP ? TCP_CSUM : UDP_CSUM)))
		at.fault = XN_DROP_CSUM;
	/* A fragment header would have to find its place among them. */
	else if (parsed && kind == NEED_UFO && at.version == 6 && at.extended)
		at.fault = XN_DROP_IPV6_EXT;
	if (at.fault) {
		view_drop(v, at.fault);
		return;
	}
	/* Fragments are cut behind the IP header, at multiples of eight bytes. */
	u16 headers = kind == NEED_UFO ? at.l4 : at.payload;
	u16 size = kind == NEED_UFO ? hdr->gso_size & ~7 : hdr->gso_size;

	if (size < GSO_MIN_SIZE || (v->len - headers + size - 1) / size > GSO_MAX_SEGMENTS) {
		view_drop(v, XN_DROP_GSO_SIZE);
		return;
	}
	v->vnet = (struct virtio_net_hdr){
		.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = hdr->csum_start, .csum_offset = hdr->csum_offset};
	v->needs = NEED_CSUM;
	/* One that fits into one segment is that already. */
	if (v->len - headers <= size)
		return;
	v->vnet.gso_type = hdr->gso_type;
	v->vnet.hdr_len = at.payload;
	v->vnet.gso_size = size;
	v->needs |= ecn | kind_of(hdr->gso_type, at.version);
}

/*
 * A checksum alone may be anywhere behind the Ethernet header and its tags, by which the frame finds its way: whoever the
 * guest's stack has made it for. It is made in a copy of ours, so the field must be in the snapshot. SCTP's is not of
 * this kind.
 */
static void judge_csum(struct view *v, const struct virtio_net_hdr *hdr, u8 sends, const u8 *p, u32 have)
{
	u32 end = (u32)hdr->csum_start + hdr->csum_offset + 2;
	struct packet at;
	bool parsed = packet_parse(p, have, v->len, &at);

	if (!(sends & NEED_CSUM) || hdr->csum_start < at.l3 || end > have ||
	    (parsed && !at.fragment && at.protocol == IPPROTO_SCTP)) {
		view_drop(v, XN_DROP_CSUM);
		return;
	}
	v->vnet = (struct virtio_net_hdr){
		.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = hdr->csum_start, .csum_offset = hdr->csum_offset};
	v->needs = NEED_CSUM;
}

void vnet_judge(struct view *v, const struct virtio_net_hdr *hdr, u8 sends, const u8 *p, u32 have)
{
	if (hdr->gso_type != VIRTIO_NET_HDR_GSO_NONE)
		judge_gso(v, hdr, sends, p, have);
	else
		judge_csum(v, hdr, sends, p, have);
}
