/*
 * Cuts a frame that stands for many into the frames of the wire: TCP and UDP segments, or IP fragments.
 *
 * Nothing is copied but the headers: a segment is a view of a header of ours and of stretches of the whole frame's pieces.
 * Segments of TCP and UDP still need their checksums; what a sum begins with is in the field, as with any partial one.
 */
#ifndef XN_GSO_H
#define XN_GSO_H

#include "packet.h"
#include "vnet.h"

/* Memory for the segments of one round: they live until the next. */
struct gso_room {
	struct view views[XN_BURST];
	u8 gap_views[XN_GAP];
	u8 headers[XN_BURST][PACKET_HEADERS + IPV6_FRAGMENT_HDR + XN_GAP];
	struct piece pieces[4096];
	u8 gap_pieces[XN_GAP];
};

struct gso {
	struct view *whole;
	struct packet at;
	u32 done;   /* bytes of payload */
	u32 number; /* of the next segment */
	u32 piece;  /* of the whole frame, where the payload goes on */
	u32 offset; /* in it */
	u32 ident;  /* of IPv6 fragments */
	/* Of a whole that is cut into fragments, while its checksum is complete. */
	struct virtio_net_hdr vnet;
	u16 partial;
};

/* A frame that has any of NEED_CUT, as vnet_judge left it. For fragments, its checksum is complete meanwhile. */
void gso_start(struct gso *g, struct view *whole);
/* The next segments, in room->views; how many. 0: that was all, and the whole is as it was. */
u32 gso_next(struct gso *g, struct gso_room *room);

#endif
