#include "packets.h"

#include <linux/if_ether.h>
#include <netinet/in.h>

#include "frame/csum.h"
#include "frame/packet.h"

enum kind {
	TCP4,
	UDP4,
	TCP6,
	UDP6,
	ARP,
	ICMP4,
	ICMP6,
	TUNNEL4,
	TCP4_OPTIONS,
	TCP6_EXTENSIONS,
	UDP6_EXTENSIONS,
	FRAGMENT4,
	FRAGMENT6,
	RARP,
	OTHER,
	SCTP4
};

static void put_macs(struct input *in, const struct stations *at, u8 choice, u8 *to)
{
	static const u8 broadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, multicast[6] = {0x33, 0x33, 0, 0, 0, 1};
	static const u8 bridges[6] = {0x01, 0x80, 0xc2, 0, 0, 0x0e};
	u8 unknown[6] = {2, 0xee, 0, 0, 0, (u8)(choice >> 3)};
	const u8 *destinations[] = {broadcast,
				    at->mac[(at->self + 1) % at->n],
				    at->mac[(at->self + 2) % at->n],
				    at->mac[at->n - 1],
				    unknown,
				    multicast,
				    at->mac[at->self],
				    bridges};
	const u8 *source = at->mac[at->self];

	memcpy(to, destinations[choice & 7], 6);
	if (choice >> 5 == 5)
		source = at->mac[(at->self + 1) % at->n];
	else if (choice >> 5 == 6)
		unknown[5] = take8(in), source = unknown;
	else if (choice >> 5 == 7)
		source = choice & 8 ? broadcast : multicast;
	memcpy(to + 6, source, 6);
}

static void put_csum(u8 *l4, u32 field, u32 len, u64 pseudo, bool partial)
{
	u16 sum;

	memset(l4 + field, 0, 2);
	sum = partial ? csum_fold(pseudo) : (u16)~csum_fold(pseudo + csum_bytes(l4, len));
	memcpy(l4 + field, &sum, sizeof(sum));
}

/* IPv4 with options, IPv6 with extension headers: returns where the transport begins. */
static u32 put_ip(struct input *in, u8 *frame, u32 l3, u8 version, u8 protocol, bool extended, bool fragment)
{
	u8 *ip = frame + l3;

	if (version == 4) {
		u32 options = extended ? take8(in) % 11 : 0;

		memset(ip, 0, 60);
		ip[0] = (u8)(0x45 + options);
		ip[5] = take8(in);
		ip[6] = fragment ? 0x20 : 0x40;
		ip[8] = 64;
		ip[9] = protocol;
		memcpy(ip + 12, (u8[]){10, 0, 0, 1, 10, 0, 0, 2}, 8);
		memset(ip + 20, 1, 4 * options);
		return l3 + 20 + 4 * options;
	}
	static const u8 extensions[] = {IPPROTO_HOPOPTS, IPPROTO_ROUTING, IPPROTO_DSTOPTS, IPPROTO_DSTOPTS};
	u32 n = extended ? 1 + take8(in) % 10 : 0, at = l3 + 40;
	u8 *next = &ip[6];

	memset(ip, 0, 40);
	ip[0] = 0x60;
	ip[7] = 64;
	memcpy(ip + 8, (u8[]){0xfe, 0x80}, 2);
	ip[23] = 1;
	memcpy(ip + 24, (u8[]){0xff, 2}, 2);
	ip[39] = 1;
	for (u32 i = 0; i < n + fragment; i++) {
		u8 size = i < n ? take8(in) % 3 : 0;

		*next = i < n ? extensions[i % 4] : IPPROTO_FRAGMENT;
		memset(frame + at, 0, 8 + 8 * size);
		frame[at + 1] = size;
		if (i == n)
			frame[at + 3] = 1;
		next = &frame[at];
		at += 8 + 8 * size;
	}
	*next = protocol;
	return at;
}

static void finish_ip(u8 *frame, u32 l3, u8 version, u32 end)
{
	u8 *ip = frame + l3;
	u16 sum;

	if (version == 6) {
		store_be16(ip + 4, end - l3 - 40);
		return;
	}
	store_be16(ip + 2, end - l3);
	memset(ip + 10, 0, 2);
	sum = (u16)~csum_fold(csum_bytes(ip, (ip[0] & 0xf) * 4u));
	memcpy(ip + 10, &sum, sizeof(sum));
}

static u32 put_arp(u8 *frame, u32 l3, bool reverse)
{
	memcpy(frame + l3, (u8[]){0, 1, 8, 0, 6, 4, 0, reverse ? 3 : 1}, 8);
	memcpy(frame + l3 + 8, frame + 6, 6);
	memcpy(frame + l3 + 14, (u8[]){10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2}, 14);
	return l3 + 28;
}

static u32 put_packet(struct input *in, u8 *frame, enum kind kind, u32 payload, u32 tags, bool partial,
		      struct virtio_net_hdr *hdr);

/* What a tunnel puts around a packet: a UDP port, or a protocol of IP below 256; its header, which ends with an EtherType. */
static const struct tunnel {
	u16 to;
	u8 n;
	u8 header[20];
	bool ethernet;
} tunnels[] = {
	{4789, 8, {8, 8, 8, 8, 8, 8, 8, 0}, true},
	{8472, 8, {8, 0, 0, 0, 0, 0, 7, 0}, true},
	{4790, 8, {0x0c, 0, 0, 1, 0, 0, 7, 0}, false},
	{6081, 12, {1, 0, 0x65, 0x58, 0, 0, 7, 0, 1, 1, 0, 0}, true},
	{2152, 16, {0x34, 255, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0x85, 1, 0, 0, 0}, false},
	{5555, 0, {0}, false},
	{6080, 4, {0, IPPROTO_IPIP, 0, 0}, false},
	{6635, 8, {0, 1, 0, 64, 0, 1, 1, 64}, false},
	{1701, 12, {0, 3, 0, 0, 0, 0, 0, 7, 1, 2, 3, 4}, true},
	{IPPROTO_IPIP, 0, {0}, false},
	{IPPROTO_GRE, 4, {0, 0, 8, 0}, false},
	{IPPROTO_GRE, 16, {0xb0, 0, 0x65, 0x58, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2}, true},
	{IPPROTO_GRE, 16, {0x10, 0, 0x88, 0xbe, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0}, true},
	{IPPROTO_MPLS, 4, {0, 1, 1, 64}, false},
	{143, 0, {0}, true},
	{115, 8, {0, 0, 0, 7, 1, 2, 3, 4}, true},
};

/* Behind the IP header, which is told what it carries; where it ends. */
static u32 put_tunnel(struct input *in, u8 *frame, u32 l3, u32 l4, u32 payload, bool partial,
		      struct virtio_net_hdr *hdr)
{
	static u8 inner[2048];
	const struct tunnel *t = &tunnels[take8(in) % ARRAY_LEN(tunnels)];
	const enum kind kind = t->ethernet ? take8(in) % 4 : take8(in) % 2;
	u32 at = l4, skip = t->ethernet ? 0 : ETH_HLEN, n;

	if (t->to > 255) {
		store_be16(frame + l4 + 2, t->to);
		at += UDP_HDR;
	} else {
		frame[l3 + 9] = (u8)t->to;
	}
	memset(inner, 2, 12);
	n = put_packet(in, inner, kind, min_u32(payload, 1400), 0, partial, hdr);
	memcpy(frame + at, t->header, t->n);
	if (t->to == 2152)
		store_be16(frame + at + 2, t->n - 8 + n - skip);
	memcpy(frame + at + t->n, inner + skip, n - skip);
	hdr->csum_start = (u16)(hdr->csum_start + at + t->n - skip);
	return at + t->n + n - skip;
}

/* None, partial too, or as the kernel has it while the inner one is partial (lco_csum). */
static void put_outer_csum(struct input *in, u8 *frame, u32 l4, u32 end, u64 pseudo, const struct virtio_net_hdr *hdr)
{
	u8 how = take8(in) % 3;
	u16 sum = 0;

	memset(frame + l4 + UDP_CSUM, 0, 2);
	if (how == 1) {
		put_csum(frame + l4, UDP_CSUM, end - l4, pseudo, true);
	} else if (how == 2) {
		memcpy(&sum, frame + hdr->csum_start + hdr->csum_offset, sizeof(sum));
		sum = (u16)~csum_fold(pseudo + csum_bytes(frame + l4, hdr->csum_start - l4) + (u16)~sum);
		memcpy(frame + l4 + UDP_CSUM, &sum, sizeof(sum));
	}
}

static u32 put_packet(struct input *in, u8 *frame, enum kind kind, u32 payload, u32 tags, bool partial,
		      struct virtio_net_hdr *hdr)
{
	static const u16 types[] = {ETH_P_8021Q, ETH_P_8021AD, ETH_P_8021Q};
	const bool six = kind == TCP6 || kind == UDP6 || kind == ICMP6 || kind == TCP6_EXTENSIONS ||
			 kind == UDP6_EXTENSIONS || kind == FRAGMENT6;
	const bool tcp = kind == TCP4 || kind == TCP6 || kind == TCP4_OPTIONS || kind == TCP6_EXTENSIONS;
	const bool arp = kind == ARP || kind == RARP;
	const u8 protocol = tcp		    ? IPPROTO_TCP
			    : kind == ICMP4 ? IPPROTO_ICMP
			    : kind == ICMP6 ? IPPROTO_ICMPV6
			    : kind == SCTP4 ? IPPROTO_SCTP
					    : IPPROTO_UDP;
	u32 l3 = 14, l4, l4_header = 8, field = UDP_CSUM, end;

	for (u32 i = 0; i < tags; i++, l3 += 4) {
		store_be16(frame + l3 - 2, types[i]);
		store_be16(frame + l3, i + 1);
	}
	store_be16(frame + l3 - 2, kind == ARP	   ? ETH_P_ARP
				   : kind == RARP  ? ETH_P_RARP
				   : kind == OTHER ? 0x88b5
				   : six	   ? ETH_P_IPV6
						   : ETH_P_IP);
	if (arp)
		return put_arp(frame, l3, kind == RARP);
	if (kind == OTHER) {
		memset(frame + l3, 0x77, payload);
		return l3 + payload;
	}
	l4 = put_ip(in, frame, l3, six ? 6 : 4, protocol,
		    kind == TCP4_OPTIONS || kind == TCP6_EXTENSIONS || kind == UDP6_EXTENSIONS,
		    kind == FRAGMENT4 || kind == FRAGMENT6);
	memset(frame + l4, 0, 60);
	if (tcp) {
		l4_header = kind == TCP4_OPTIONS ? 20 + 4 * (take8(in) % 11) : 20;
		field = TCP_CSUM;
		frame[l4 + 12] = (u8)(l4_header / 4 << 4);
		frame[l4 + TCP_FLAGS] = 0x10;
	} else if (protocol == IPPROTO_UDP) {
		store_be16(frame + l4 + 2, 9);
	} else if (kind == ICMP6) {
		static const u8 messages[] = {135, 136, 134, 137, 128};

		frame[l4] = messages[take8(in) % ARRAY_LEN(messages)];
		l4_header = 24;
		field = 2;
	}
	end = l4 + l4_header;
	if (kind == TUNNEL4) {
		end = put_tunnel(in, frame, l3, l4, payload, partial, hdr);
	} else {
		memset(frame + end, 0x55, payload);
		end += payload;
		hdr->csum_start = (u16)l4;
		hdr->csum_offset = (u16)field;
		hdr->hdr_len = (u16)(l4 + l4_header);
	}
	/* Of GRE and the like there is no UDP header around what is in them. */
	if (kind == TUNNEL4 && frame[l3 + 9] != IPPROTO_UDP) {
		finish_ip(frame, l3, 4, end);
		return end;
	}
	if (protocol == IPPROTO_UDP)
		store_be16(frame + l4 + 4, end - l4);
	finish_ip(frame, l3, six ? 6 : 4, end);
	u64 pseudo = csum_pseudo(frame + l3, six ? 6 : 4, protocol, end - l4);

	if (kind == TUNNEL4 && partial)
		put_outer_csum(in, frame, l4, end, pseudo, hdr);
	else
		put_csum(frame + l4, field, end - l4, pseudo, partial);
	return end;
}

u32 packet_make(struct input *in, const struct stations *at, u8 *to, struct virtio_net_hdr *hdr)
{
	static const u32 payloads[] = {46, 18, 1000, 1460, 65000, 0, 9000, 2};
	static const u16 sizes[] = {1448, 1448, 512, 64, 8, 7, 0, 65535};
	const u8 macs = take8(in), what = take8(in), asked = take8(in), wrong = take8(in);
	const enum kind kind = what & 15;
	const bool segments = asked & 0x80, partial = segments || asked & 0x40;
	u32 payload = payloads[what >> 4 & 7], len;

	if (what & 0x80)
		payload = take16(in);
	if (segments && payload < 1000)
		payload = 9000;
	payload = min_u32(payload, 65535 - 300);
	put_macs(in, at, macs, to);
	*hdr = (struct virtio_net_hdr){0};
	len = put_packet(in, to, kind, payload, macs >> 3 & 3, partial, hdr);
	if (partial)
		hdr->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	else
		*hdr = (struct virtio_net_hdr){0};
	if (segments) {
		const bool tcp = kind == TCP4 || kind == TCP6 || kind == TCP4_OPTIONS || kind == TCP6_EXTENSIONS;
		const bool six = kind == TCP6 || kind == TCP6_EXTENSIONS;

		hdr->gso_type = tcp	       ? six ? VIRTIO_NET_HDR_GSO_TCPV6 : VIRTIO_NET_HDR_GSO_TCPV4
				: asked & 0x20 ? VIRTIO_NET_HDR_GSO_UDP
					       : 5; /* VIRTIO_NET_HDR_GSO_UDP_L4 */
		hdr->gso_size = sizes[asked & 7];
		if (tcp && asked & 0x10)
			hdr->gso_type |= VIRTIO_NET_HDR_GSO_ECN;
	}
	/* A byte of the headers that is not as it should be. */
	if ((wrong & 7) == 7) {
		u8 where = take8(in);

		if (where < len)
			to[where] = take8(in);
	}
	if (wrong >> 4 == 15) {
		static const u8 bytes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
		u8 *raw = (u8 *)hdr;

		for (u32 n = 1 + (wrong >> 3 & 1); n; n--) {
			u8 field = bytes[take8(in) % sizeof(bytes)];

			raw[field] = take8(in);
		}
		if (!hdr->flags && !hdr->gso_type)
			hdr->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	}
	/* Cut short, or longer than the packet in it. */
	if (wrong >> 4 == 14)
		len = take8(in);
	else if (wrong >> 4 == 13)
		len += take8(in);
	return len;
}
