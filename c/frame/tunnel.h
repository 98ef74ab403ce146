/*
 * Packets in packets: what a frame carries behind the headers of tunnels, labels and more tags than the bridge looks at.
 *
 * Most tunnels over UDP may use any port, so a header is known by what it says, and only where what it carries fits in: an
 * IP packet whose own header is right, and which ends where the outer one does.
 */
#ifndef XN_TUNNEL_H
#define XN_TUNNEL_H

#include "packet.h"

/* Packets one in the other that are looked at, and bytes of headers that they have together, at most. */
enum { TUNNEL_DEPTH = 4, TUNNEL_HEADERS = 1024 };

enum { GRE_CSUM = 4, GRE_HAS_CSUM = 0x80 /* in the first byte */ };

/* The outermost IP packet of a frame that packet_parse does not find one in. */
bool tunnel_enter(const u8 *p, u32 have, u32 len, struct packet *out);
/* The packet in a packet; its offsets are of the frame, too. False: there is none that we know. */
bool tunnel_within(const u8 *p, u32 have, const struct packet *outer, struct packet *inner);
/* Whether it is of a protocol that carries packets; UDP may. */
bool tunnel_may_be(const struct packet *at);
/* Whether it goes to a port that tunnels have to themselves. */
bool tunnel_has_port(const u8 *p, const struct packet *at);

#endif
