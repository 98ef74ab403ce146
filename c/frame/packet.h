/*
 * What a frame is by its own bytes: Ethernet with up to two VLAN tags, IPv4 or IPv6 with its extension headers, TCP or UDP.
 *
 * The bytes are a snapshot of ours. Every length that they name is checked against the frame before it is used.
 */
#ifndef XN_PACKET_H
#define XN_PACKET_H

#include "base.h"

/* Headers end within so many bytes, or the frame is passed on without a look at them. */
enum { PACKET_HEADERS = 256, PACKET_TAGS = 2 };

enum { IPV4_HDR = 20, IPV6_HDR = 40, IPV6_FRAGMENT_HDR = 8, TCP_HDR = 20, UDP_HDR = 8, VLAN_HDR = 4 };
/* Where the checksums are, behind the start of the TCP, UDP or SCTP header. */
enum { TCP_CSUM = 16, UDP_CSUM = 6, SCTP_CSUM = 8 };
/* Likewise, and one of the flags. */
enum { TCP_FLAGS = 13, TCP_CWR = 0x80 };

struct packet {
	u8 version;    /* of IP: 4 or 6 */
	u8 protocol;   /* behind IP and its extension headers */
	bool fragment; /* a fragment: there is no whole TCP or UDP in it, and nothing was looked at behind IP */
	bool extended; /* IPv4 with options, IPv6 with extension headers */
	u16 type;      /* EtherType, behind the tags */
	u16 l3;	       /* offset of what follows the tags, the IP header, in the frame, bytes */
	u16 l4;	       /* of what follows it */
	u16 payload;   /* of what follows TCP or UDP; l4 where it is neither */
	u32 end;       /* of the IP packet */
	u8 fault;      /* enum xn_drop, where it is not as it should be */
};

static inline u16 load_be16(const u8 *p)
{
	return (u16)(p[0] << 8 | p[1]);
}

static inline u32 load_be32(const u8 *p)
{
	return (u32)load_be16(p) << 16 | load_be16(p + 2);
}

static inline void store_be16(u8 *p, u32 v)
{
	p[0] = (u8)(v >> 8);
	p[1] = (u8)v;
}

static inline void store_be32(u8 *p, u32 v)
{
	store_be16(p, v >> 16);
	store_be16(p + 2, v & 0xffff);
}

/* So much of a frame says of which flow it is: two tags, IPv4 with all its options, ports. */
enum { PACKET_FLOW = 14 + PACKET_TAGS * VLAN_HDR + 60 + 4 };

/*
 * A number that all frames of a flow have, by their addresses and ports, of which the first `have` bytes are at p, at least
 * an Ethernet header. Fragments have no ports, nor has what is behind extension headers: there it is the addresses alone.
 */
u32 packet_flow(const u8 *p, u32 have);

/* Reads the headers of a frame of `len` bytes, of which the first `have` are at p. False: out->fault says why not. */
bool packet_parse(const u8 *p, u32 have, u32 len, struct packet *out);
/* The same of the IP packet of this EtherType that begins at l3, `have` and l3 below 2^16; it ends before `len`. */
bool packet_parse_at(const u8 *p, u32 have, u32 len, u16 type, u32 l3, struct packet *out);

#endif
