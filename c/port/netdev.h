/*
 * A netdev port: AF_XDP sockets, one a queue, and an AF_PACKET socket for what XDP cannot hand to two receivers.
 *
 * XDP gives frames to known guests to the sockets and passes all else to the host's stack. Group-addressed frames go to
 * the host too; the AF_PACKET socket picks them up for the guests. It is the slow path: one system call a batch.
 */
#ifndef XN_NETDEV_H
#define XN_NETDEV_H

#include "bridge/bridge.h"
#include "xdp/xsk.h"

struct netdev_queue {
	struct xsk *xsk;
	bool lost;		  /* its socket was closed here, not by whoever opened it */
	struct xn_xsk_stats past; /* of sockets that this queue had before */
	struct xn_queue_stats rx XN_ALIGNED;
	struct xn_queue_stats tx XN_ALIGNED;
};

struct netdev {
	struct port port;
	u32 queues;
	u32 ready_n;
	u32 ready[XN_MAX_NETDEV_QUEUES]; /* queues with an open socket */
	int group_fd;			 /* AF_PACKET, group-addressed frames; -1: none */
	bool group_failed;
	struct source group;
	struct netdev_queue *queue;
	struct arena *arena; /* the bridge's, or, where that had no room left for so many queues, its own */
	struct arena own;    /* of private frames alone */
};

/* An AF_XDP socket, and one that gets frames in several descriptors; the AF_PACKET socket. */
extern const struct source_ops xsk_source, chains_source, group_source;

static inline struct netdev *netdev_of(const struct port *p)
{
	return container_of(p, struct netdev, port);
}

/* NULL: no netdev's is the port with this id. */
static inline struct netdev *netdev_at(const struct xn_bridge *b, u32 id)
{
	struct port *p = bridge_port(b, id, PORT_NETDEV);

	return p ? netdev_of(p) : NULL;
}

void netdev_deliver(struct worker *w, struct port *p, struct burst *burst, const struct view *views, const u8 *which,
		    u32 n);
u32 netdev_room(struct worker *w, struct port *p, u32 queue, u32 wanted);

#endif
