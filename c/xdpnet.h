/*
 * xdpnet core: the whole public API of the data path.
 *
 * Plain declarations only: C reads them through base.h, Python reads the same bytes through cffi's cdef.
 *
 * A bridge joins ports. A guest port is one vhost-user device: up to XN_MAX_PAIRS pairs of virtqueues in the guest's
 * memory; ring 2p is the receive ring of pair p, ring 2p + 1 its transmit ring. A netdev port is one network interface:
 * AF_XDP sockets, one a queue, and an AF_PACKET socket for group-addressed frames. rx and tx are the guest's view.
 *
 * Threads: one control thread calls these functions; workers are threads of the core. A call that changes what workers
 * use parks them all at a loop boundary first, so when it returns no worker uses what it replaced.
 *
 * Every function that can fail returns 0 (or a count, an id, a file descriptor) or a negative errno.
 * File descriptors stay the caller's; the core duplicates those that it keeps.
 */

enum xn_limit {
	XN_MAX_PORTS = 128,
	XN_MAX_PAIRS = 16,
	XN_MAX_NETDEV_QUEUES = 16,
	XN_MAX_WORKERS = 16,
	XN_MAX_REGIONS = 64,
	XN_MAX_RING = 32768,
	XN_FRAME_SIZE = 4096,
	XN_MAX_IPS = 16,	 /* that a guest is given */
	XN_MAX_OWN_MACS = 16,	 /* that a port is given */
	XN_MAX_MACS = 4096,	 /* that one guest may teach */
	XN_MAX_GIVEN = 16384,	 /* addresses that are given, to guests and as those of the host */
	XN_MAX_STATIONS = 65536, /* of the wire, that are known at once; the longest silent are forgotten for others */
	XN_MIN_FRAMES = 256,	 /* of a netdev queue */
	XN_MAX_FRAMES = 65536,
	/* The longest frame that an AF_XDP buffer takes from the wire: XDP_PACKET_HEADROOM is in front. */
	XN_MAX_PLAIN_FRAME = XN_FRAME_SIZE - 256,
	/* Of an interface: a frame is three buffers then, and drivers with zero copy take from five to eight. */
	XN_MAX_MTU = 9216
};

enum xn_direction { XN_RX, XN_TX };

/*
 * Why a frame was lost; every lost frame is in exactly one of these, on the queue where it was lost. What Python calls
 * them, and the counters below, is read from here: XN_DROP_NO_BUFFER is "no_buffer".
 */
enum xn_drop {
	XN_DROP_SHORT,	   /* a chain with no frame behind its virtio_net_hdr */
	XN_DROP_RUNT,	   /* a frame shorter than an Ethernet header */
	XN_DROP_OVERSIZE,  /* a frame longer than 64 KiB, or than the interface carries */
	XN_DROP_PIECES,	   /* a chain of more pieces than the core gathers */
	XN_DROP_LEFT_OUT,  /* a chain in memory that is left out; to receive, as many as a frame may try */
	XN_DROP_GSO_TYPE,  /* a virtio_net_hdr that asks for a segmentation that was not negotiated, or is none */
	XN_DROP_GSO_SIZE,  /* for segments that are too small, or too many */
	XN_DROP_GSO_CSUM,  /* for segments, and not for their checksums */
	XN_DROP_GSO_PROTO, /* for segments of another protocol than the frame's */
	XN_DROP_CSUM,	   /* for a checksum that was not negotiated, or where the frame has none */
	XN_DROP_L3,	   /* to be segmented, and its IP header is not as it should be */
	XN_DROP_L4,	   /* to be segmented, and its TCP or UDP header is not as it should be */
	XN_DROP_IPV6_EXT,  /* to be segmented, and it has too many or broken extension headers */
	XN_DROP_FRAGMENT,  /* to be segmented, and it is a fragment */
	XN_DROP_VLAN,	   /* to be segmented, and it has more VLAN tags than two */
	XN_DROP_SPOOF,	   /* a source address that is not the guest's own */
	XN_DROP_REFLECTED, /* from the wire, to many, with the given address of a guest that is here: its own, come back */
	XN_DROP_POLICY,	   /* for the next bridge alone, to pause a card, or with another's IP address */
	XN_DROP_DISABLED,  /* transmitted on a ring that is started but disabled */
	XN_DROP_NO_PORT,   /* the destination is the port it came from, or there is no other */
	XN_DROP_NO_BUFFER, /* the guest has posted too few receive buffers, for too long or for too many frames */
	XN_DROP_TOO_SMALL, /* the guest's receive buffer is smaller than the frame */
	XN_DROP_COSTLY,	   /* the guest's receive buffers are of so many descriptors that to find them costs too much */
	XN_DROP_NOT_READY, /* the port has no ring or socket that is up */
	XN_DROP_BROKEN,	   /* the guest's ring broke before the frame was handed over */
	XN_DROP_NO_FRAME,  /* the kernel has yet to give back frames of the interface */
	XN_DROP_BAD_FRAME, /* the kernel delivered a descriptor that is not ours */
	XN_DROP_FRAGS,	   /* the kernel delivered a frame in more pieces than it has, or one that does not end */
	XN_DROP_TRUNCATED, /* a group-addressed frame longer than the core reads */
	XN_DROP_COUNT
};

/* Why a ring is latched broken. */
enum xn_broken {
	XN_RING_OK,
	XN_BROKEN_AVAIL_JUMP,	/* the available index ran ahead by more than the ring's size */
	XN_BROKEN_HEAD,		/* a head outside the descriptor table */
	XN_BROKEN_NEXT,		/* a next field outside the descriptor table */
	XN_BROKEN_LOOP,		/* a chain of more descriptors than its table has */
	XN_BROKEN_ADDR,		/* a descriptor outside the guest's memory */
	XN_BROKEN_DIRECTION,	/* a device-writable transmit or a device-readable receive descriptor */
	XN_BROKEN_INDIRECT,	/* an indirect descriptor not negotiated, nested, or with NEXT */
	XN_BROKEN_INDIRECT_LEN, /* an indirect table of no, partial or too many descriptors */
	XN_BROKEN_CHAIN,	/* packed: a chain that runs into a descriptor which is not available */
	XN_BROKEN_ID,		/* packed: a buffer id outside the ring */
	XN_BROKEN_POSITION,	/* packed: its flags do not tell where a device that is gone has left it */
	XN_BROKEN_MEMORY,	/* the memory under the ring was taken away (SIGBUS) */
	XN_BROKEN_COUNT
};

/* What xn_bridge_events reports. */
enum xn_event {
	XN_EVENT_FDB = 1,    /* a guest's address was learned, moved or forgotten */
	XN_EVENT_BROKEN = 2, /* a ring broke for another reason */
	XN_EVENT_MEMORY = 4, /* a ring broke because guest memory was taken away under us */
	XN_EVENT_SOCKET = 8, /* an AF_XDP or AF_PACKET socket reported an error */
	XN_EVENT_UMEM = 16   /* xn_guest_leave_umem and xn_netdev_is_stale may have another answer now */
};

/*
 * Whether frames of guests are sent from where they lie. AUTO: of guests that nothing is decided for by a frame's header,
 * from memory in huge pages. ON: of every guest whose source address is not checked.
 */
enum xn_zerocopy { XN_ZEROCOPY_OFF, XN_ZEROCOPY_AUTO, XN_ZEROCOPY_ON };

struct xn_bridge;

struct xn_bridge_config {
	uint32_t workers;	      /* 1 .. XN_MAX_WORKERS */
	int32_t cpus[XN_MAX_WORKERS]; /* the CPU of each worker; -1: not pinned */
	uint32_t spin_us;	      /* a source is polled so long after its last frame; 16 times in a conversation */
	uint32_t ageing_s; /* how long a learned address lives, but for those of guests that are here; 0: for ever */
	uint32_t netdev_queues;	   /* AF_XDP sockets that there are frames for; a port beyond has frames of its own */
	uint32_t frames_per_queue; /* power of two, XN_MIN_FRAMES .. XN_MAX_FRAMES; half of them for receive */
	uint32_t max_macs;	   /* addresses that one guest may teach the bridge, 1 .. XN_MAX_MACS */
	uint32_t zerocopy;	   /* enum xn_zerocopy, the most that any of its netdevs will use */
	uint32_t copybreak;	   /* shorter frames are always copied, bytes */
};

/* A region's pages, mapped in advance of its being a guest's. */
struct xn_staged {
	uint64_t base;
	uint64_t length; /* bytes */
	uint64_t huge;	 /* on hugetlbfs */
};

struct xn_region {
	uint64_t guest_addr;	 /* guest physical address */
	uint64_t size;		 /* bytes */
	uint64_t user_addr;	 /* the frontend's own address of it */
	uint64_t offset;	 /* of the region in its file, bytes */
	struct xn_staged staged; /* taken over whatever becomes of the region; base 0: nothing is */
	int32_t fd;
	uint32_t filled; /* every page that is staged is there: it may be lent */
	/*
	 * The guest has it, and it is not to be mapped: no ring starts in it, and chains that have some of it are handed
	 * back. Of its file nothing is looked at.
	 */
	uint32_t left_out;
	uint32_t pad;
};

struct xn_ring_config {
	uint32_t num;	     /* entries, 1 .. XN_MAX_RING; split: a power of two */
	uint32_t base;	     /* where to start, as SET_VRING_BASE has it */
	uint64_t desc_addr;  /* frontend addresses, aligned to 16, 2 and 4; packed: 16, 4 and 4 */
	uint64_t avail_addr; /* packed: the driver's event suppression structure */
	uint64_t used_addr;  /* packed: the device's */
	int32_t kick_fd;     /* -1: none, the ring is polled */
	int32_t call_fd;     /* -1: none, the guest polls */
	int32_t err_fd;	     /* -1: none */
	uint32_t logs;	     /* what is written into the used ring is logged ... */
	uint64_t log_addr;   /* ... as if it lay at this guest physical address; packed: the device's structure */
};

struct xn_queue_stats {
	uint64_t packets;
	uint64_t bytes;		       /* of Ethernet frames, without virtio_net_hdr */
	uint64_t drops[XN_DROP_COUNT]; /* by enum xn_drop */
	uint64_t copies;	       /* more ports than one that a frame of this queue was flooded to */
	uint64_t bursts;	       /* polls that found something */
	uint64_t kicks;		       /* guest rings: kicks taken. netdev tx: sendto() calls */
	uint64_t kicks_saved;	 /* guest rings: buffers found without a kick. netdev tx: bursts that needed none */
	uint64_t calls;		 /* guest rings: interrupts sent */
	uint64_t calls_saved;	 /* guest rings: used buffers published that the guest asked no interrupt for */
	uint64_t chains;	 /* guest rings: descriptor chains taken */
	uint64_t cut;		 /* frames that were cut into frames of the wire */
	uint64_t segments;	 /* more frames than one that these became */
	uint64_t joined;	 /* netdev rx: frames that became part of the one before, for the guest that took it */
	uint64_t csum_computed;	 /* netdev tx: checksums made as the frame, or segment, was copied */
	uint64_t csum_completed; /* made for a guest that takes no partial ones; of a datagram that was cut */
	uint64_t csum_partial;	 /* handed on as they were: to a guest that takes such; netdev tx: to the interface */
	uint64_t csum_verified;	 /* netdev rx: checksums found right */
	uint64_t in_place;	 /* netdev tx: packets that were sent from guest memory; the others were copied */
	uint64_t breaks;	 /* times this ring broke */
	uint64_t unlearned;	 /* times a source address was not learned, for want of room in the port's share */
	uint64_t waited;	 /* guest rx: frames that found no buffer and waited for one */
	uint64_t left_out;	 /* guest rx: chains handed back because some of them is in memory that is left out */
};

/* State of a guest's ring; indices as they stand in the ring, zero unless started. */
struct xn_ring_state {
	uint32_t num;
	uint32_t started;
	uint32_t enabled;
	uint32_t broken; /* enum xn_broken */
	uint32_t packed;
	uint32_t worker;
	uint32_t last_avail;  /* next entry the core will take */
	uint32_t avail_idx;   /* published by the guest */
	uint32_t used_idx;    /* published by the core */
	uint32_t avail_event; /* the index at which the core wants a kick */
	uint32_t used_event;  /* the index at which the guest wants an interrupt */
	uint32_t waiting;     /* frames that wait for receive buffers */
};

/* A ring that was latched broken. */
struct xn_broken_ring {
	uint32_t port;
	uint32_t ring;
	uint32_t broken; /* enum xn_broken; XN_RING_OK: it was started anew meanwhile */
};

/* What keeps a guest from its frames: the first ring that is latched broken, and the receive ring longest without a buffer. */
struct xn_guest_faults {
	uint32_t broken; /* enum xn_broken; XN_RING_OK: none is */
	uint32_t broken_ring;
	uint32_t starved_ring;
	uint32_t pad;
	uint64_t starved_us; /* since a frame came for which it had none, and it has had none since; 0: none is */
};

/* XDP_STATISTICS of a queue's sockets, summed over every socket it has had, and its ring fill. */
struct xn_xsk_stats {
	uint64_t rx_dropped; /* without those that found the fill ring empty, which the kernel counts here too */
	uint64_t rx_invalid_descs;
	uint64_t tx_invalid_descs;
	uint64_t rx_ring_full;
	uint64_t rx_fill_ring_empty_descs;
	uint64_t tx_ring_empty_descs;
	uint64_t frames_free; /* frames in the core's hand now */
	uint64_t frames_fill; /* frames lent to the kernel for receive, or received and not yet read */
	uint64_t frames_tx;   /* frames lent to the kernel for transmit */
	uint64_t in_flight;   /* of these, such that stand for a frame in guest memory */
	uint64_t umem;	      /* bytes of the UMEM, guest memory included */
	uint32_t open;
	uint32_t zerocopy; /* as XDP_OPTIONS reports it: the driver's */
};

struct xn_worker_stats {
	uint64_t loops;	      /* turns of the loop */
	uint64_t sleeps;      /* times it went to sleep */
	uint64_t busy_cycles; /* TSC cycles of turns that moved something */
	uint64_t packets;     /* frames taken from any port */
	int32_t cpu;
	int32_t tid;
	/*
	 * Where it is: port << 8 | ring or queue; a netdev's group socket is behind its queues. XN_AT_REST: asleep, from
	 * which it wakes ten times a second. XN_PARKED: it stands still for the control thread, or was not started.
	 */
	uint32_t at;
	uint32_t to; /* ... and delivers to; XN_AT_REST: to none */
};

enum { XN_AT_REST = 0xffff, XN_PARKED = 0xfffe };

struct xn_ip {
	uint8_t version; /* 4 or 6 */
	uint8_t ip[16];	 /* of version 4 the first four */
};

/* A frame of a guest's that was dropped for what it claims to be. */
struct xn_offence {
	uint8_t src[6];	 /* its source ... */
	uint8_t dst[6];	 /* ... and destination */
	uint16_t type;	 /* as it stands behind these */
	struct xn_ip ip; /* that it speaks for; of version 0: none that the core understands, or looked for */
	uint64_t age_ms;
};

enum { XN_ANY_VLAN = 0xffff };

struct xn_fdb_entry {
	uint8_t mac[6];
	uint16_t vlan; /* 0: untagged; XN_ANY_VLAN: any (static entries) */
	uint32_t port;
	uint32_t is_static;
	uint32_t age_s; /* since last seen */
};

/* ---- bridge and workers ---- */

/*
 * Whether eventfds can be signalled without ever waiting for their counters: 0; -ENOSYS or -EPERM: there is no
 * asynchronous I/O here; -EAGAIN: others have used up all that the host has of it.
 */
int xn_check_calls(void);

struct xn_bridge *xn_bridge_new(const struct xn_bridge_config *config); /* NULL: errno */
int xn_bridge_start(struct xn_bridge *b);				/* start the workers */
int xn_bridge_stop(struct xn_bridge *b);				/* join them; idempotent */
void xn_bridge_free(struct xn_bridge *b);				/* stop, close and unmap all */
/* Whether guests' memory can be lent to interfaces at all: 0 without that wish, address space or userfaultfd(2). */
int xn_bridge_lends(const struct xn_bridge *b);
int xn_bridge_event_fd(struct xn_bridge *b);	/* readable when xn_bridge_events has news */
uint32_t xn_bridge_events(struct xn_bridge *b); /* enum xn_event bits since the last call; clears the fd */
uint64_t
xn_bridge_parked_ns(const struct xn_bridge *b); /* that the workers have stood still for the control thread, so far */
/* Rings that broke since the last call; there is room for all, 2 * XN_MAX_PAIRS of each port. Their number. */
int xn_bridge_broken(struct xn_bridge *b, struct xn_broken_ring *out);
int xn_worker_stats(struct xn_bridge *b, uint32_t worker, struct xn_worker_stats *out);
/* Two values of the configuration, which may change while the workers run. */
int xn_bridge_tune(struct xn_bridge *b, uint32_t spin_us, uint32_t ageing_s);

enum xn_way { XN_IN, XN_OUT };
/* Sums of what was counted by queues of ports that were removed: those that frames came into the bridge by, or left it by. */
void xn_bridge_gone(const struct xn_bridge *b, uint32_t way, struct xn_queue_stats *out);

/* ---- time, for tests ---- */

/*
 * From now on the core's time stands still, in the whole process: what waits, or polls on for a while, does so until it
 * is advanced. -EALREADY. A bridge that lives on after the release may find the time behind where it was.
 */
int xn_time_hold(void);
void xn_time_release(void);
/*
 * Advances the time that is held (-EINVAL: it is not), wakes the workers of this bridge, and returns when each of them
 * has looked at its events and then taken a whole turn by the new time. 0: they do that, at the same time.
 */
int xn_time_advance(struct xn_bridge *b, uint64_t us);

/* ---- addresses ---- */

/* Live entries, at most max, and of stations of the wire at most so many; these come last. */
int xn_fdb_dump(struct xn_bridge *b, struct xn_fdb_entry *out, uint32_t max, uint32_t stations);
/* How many are live of each port, XN_MAX_PORTS each. */
void xn_fdb_count(struct xn_bridge *b, uint32_t *given, uint32_t *learned);
/*
 * How often guests have taught an address that was no guest's before. What a guest sends after that waits until this
 * number, read before the addresses, was given to xn_fdb_steered: then the answer finds its way. It waits for a second at
 * most, and not at all before the first call of that.
 */
uint32_t xn_fdb_changes(struct xn_bridge *b);
void xn_fdb_steered(struct xn_bridge *b, uint32_t changes);
int xn_fdb_flush(struct xn_bridge *b, uint32_t port); /* forget what this port taught */

/* ---- ports ---- */

int xn_port_add_guest(struct xn_bridge *b, uint32_t pairs);   /* port id */
int xn_port_add_netdev(struct xn_bridge *b, uint32_t queues); /* port id */
/*
 * The port's own addresses, n times six bytes, in place of those that it had: nobody else may use them, and with
 * check_source it uses no other. None: it has no more of its own. -EEXIST: one is another port's; then all is as it was.
 */
int xn_port_set_macs(struct xn_bridge *b, uint32_t port, const uint8_t *macs, uint32_t n, int check_source);
int xn_port_remove(struct xn_bridge *b, uint32_t port);
/* TSC cycles that the workers have spent on the port so far: on what it sends and takes, looking for it included. */
int xn_port_cycles(struct xn_bridge *b, uint32_t port, uint64_t *cycles);
/* queue: pair (guest) or socket (netdev) number */
int xn_queue_stats(struct xn_bridge *b, uint32_t port, uint32_t queue, uint32_t direction, struct xn_queue_stats *out);

/* ---- guest ports ---- */

/*
 * The IP addresses that the guest may use as its own, beside the link-local one that its MAC gives it; none: any. Frames
 * in which it claims or probes for another are dropped, and so is what routers and DHCP servers say, and what is not IP.
 */
int xn_guest_set_ips(struct xn_bridge *b, uint32_t port, const struct xn_ip *ips, uint32_t n);
/*
 * What the guest has taught a bridge before this one: as if it had just sent from there. -EPERM: the address is not its to
 * use; -ENOSPC: it has taught its share.
 */
int xn_guest_remember(struct xn_bridge *b, uint32_t port, const uint8_t mac[6], uint32_t vlan);
/* 1: since the last call a frame of the guest was dropped for its source address (XN_DROP_SPOOF), which is put into mac. */
int xn_guest_stray(struct xn_bridge *b, uint32_t port, uint8_t mac[6]);
/* The last one that was dropped as that, XN_DROP_SPOOF or XN_DROP_POLICY (-EINVAL: neither). 1; 0: there was none. */
int xn_guest_offence(struct xn_bridge *b, uint32_t port, uint32_t drop, struct xn_offence *out);
int xn_guest_faults(struct xn_bridge *b, uint32_t port, struct xn_guest_faults *out);
/*
 * What may be lent has all its pages in the page tables, and to fill these may take seconds, which nobody else is to wait
 * for. Such a region (1: it is one; 0) is best staged: mapped and filled, part by part, by any thread. A table takes over
 * what is staged; what comes without is filled as it is mapped.
 */
int xn_guest_stages(struct xn_bridge *b, uint32_t port, const struct xn_region *region);
int xn_staged_open(const struct xn_region *region, struct xn_staged *staged);
/* -EFAULT, -EHWPOISON, -ENOMEM: some page of these cannot be had. Locks the address space while it runs. */
int xn_staged_fill(const struct xn_staged *staged, uint64_t from, uint64_t length);
void xn_staged_close(const struct xn_staged *staged);
/* Replaces the memory table (n may be 0). Started rings are translated anew; one that no longer lies in memory is stopped. */
int xn_guest_set_memory(struct xn_bridge *b, uint32_t port, const struct xn_region *regions, uint32_t n);
int xn_guest_add_region(struct xn_bridge *b, uint32_t port, const struct xn_region *region);
/* Matched by guest_addr, user_addr and size. */
int xn_guest_remove_region(struct xn_bridge *b, uint32_t port, const struct xn_region *region);
/*
 * If pages of the guest were given up and taken back, which its frames in place would not show: keeps its memory out of
 * UMEMs from now on, until it has another table; 1 if that was news. Its frames are copied since that was found out.
 */
int xn_guest_leave_umem(struct xn_bridge *b, uint32_t port);
/* The negotiated virtio feature bits; -EBUSY if this would change the layout under a started ring. */
int xn_guest_set_features(struct xn_bridge *b, uint32_t port, uint64_t features);
/*
 * The dirty log of a migration: a bit for each 4096 bytes of guest physical addresses, in `size` bytes of a file; fd -1: none.
 * While features have VHOST_F_LOG_ALL all that is written into buffers is marked there, for rings that say so what is written
 * into them. -ENOSPC, from all that would need it: it has no bit for some of the memory, or of a ring that is logged.
 */
int xn_guest_set_log(struct xn_bridge *b, uint32_t port, int fd, uint64_t offset, uint64_t size);
/* An eventfd that is signalled when something was marked; -1: none. */
int xn_guest_set_log_fd(struct xn_bridge *b, uint32_t port, int fd);
/* Of a started ring: as in its configuration. */
int xn_ring_set_log(struct xn_bridge *b, uint32_t port, uint32_t ring, int logs, uint64_t log_addr);
/* -EFAULT: a part of the ring lies outside the memory table; -EINVAL: size or alignment. */
int xn_ring_start(struct xn_bridge *b, uint32_t port, uint32_t ring, const struct xn_ring_config *config);
/*
 * Stops the ring, if it is started: nothing touches it afterwards. *base: where to go on, as SET_VRING_BASE has it.
 * Frames that are being sent in place are waited for, for 10 ms, while the workers go on; then the sockets that have them
 * are closed, and this guest's are copied from then on. The same goes for whatever takes memory or a port away.
 */
int xn_ring_stop(struct xn_bridge *b, uint32_t port, uint32_t ring, uint32_t *base);
/*
 * Sends a RARP as if the guest had, whether its rings run or not, so that everybody learns where this address is. It is
 * counted with the first transmit ring's frames. -EPERM: the address is not this port's to use.
 */
int xn_guest_announce(struct xn_bridge *b, uint32_t port, const uint8_t mac[6]);
int xn_ring_enable(struct xn_bridge *b, uint32_t port, uint32_t ring, int enabled);
int xn_ring_set_call(struct xn_bridge *b, uint32_t port, uint32_t ring, int fd);
int xn_ring_set_err(struct xn_bridge *b, uint32_t port, uint32_t ring, int fd);
int xn_ring_state(struct xn_bridge *b, uint32_t port, uint32_t ring, struct xn_ring_state *out);

/* ---- netdev ports ---- */

/*
 * An address that the host has on the interface: no guest may use it, and what one has taught of it is forgotten. A port
 * may have any number. -EEXIST: it is another port's own; -ENOSPC: XN_MAX_GIVEN are given.
 */
int xn_netdev_add_mac(struct xn_bridge *b, uint32_t port, const uint8_t mac[6]);
int xn_netdev_remove_mac(struct xn_bridge *b, uint32_t port, const uint8_t mac[6]); /* -ENOENT: the port has no such */

/* What is known of an interface's frames. */
enum xn_netdev_flag {
	/*
	 * By the time a sendto() returns the driver has a copy of what it took, unless it has zero copy; then the guest has
	 * its buffers back, and need not wait until the frame has been received.
	 */
	XN_COPIES_AT_ONCE = 1,
	/* Unless it has zero copy, the driver's interface completes partial checksums that it is told of by metadata. */
	XN_MAKES_CSUM = 2,
	/* Several that the kernel has in one may come, in several buffers as if they were longer (below). */
	XN_JOINED = 4,
	/* The driver has no zero copy: to ask it takes as long as to bind, where guests have much memory. */
	XN_COPY = 8,
	/* In front of each frame the XDP program has put what says whether it is several in one (xdpnet/bpf/steer.c). */
	XN_TELLS = 16
};

/*
 * Registers the UMEM that the socket would have, if none has it yet, so that it does not take the time when xn_netdev_open_queue
 * needs it: some 100 ms for each GiB of guests' memory. Until then it is kept; at most one is.
 */
int xn_netdev_prepare(struct xn_bridge *b, uint32_t port, uint32_t max_frame, uint32_t zerocopy, uint32_t flags);

/*
 * Opens and binds the AF_XDP socket of a queue; frames flow once its fd is in the XSKMAP. -EBUSY: try again for a second.
 * max_frame: the longest frame that the interface carries. Above XN_MAX_PLAIN_FRAME frames are in several buffers, which
 * takes Linux 6.6 (-EINVAL before) and, in native mode, a program that is loaded for frames in fragments.
 */
int xn_netdev_open_queue(struct xn_bridge *b, uint32_t port, uint32_t queue, uint32_t ifindex, uint32_t max_frame,
			 uint32_t zerocopy, uint32_t flags);
/* Whether its sockets can have guests' memory at all: not where the port has frames of its own. */
int xn_netdev_lends(struct xn_bridge *b, uint32_t port);
/* 1: open sockets have not the guest memory that they would have if opened again, or one had to be closed by the core. */
int xn_netdev_is_stale(struct xn_bridge *b, uint32_t port, uint32_t zerocopy);
int xn_netdev_close_queue(struct xn_bridge *b, uint32_t port, uint32_t queue);
int xn_netdev_queue_fd(struct xn_bridge *b, uint32_t port, uint32_t queue); /* still the core's */
/* An AF_PACKET socket bound to the interface, with PACKET_VNET_HDR, filtered to group-addressed frames; -1 takes it away. */
int xn_netdev_set_group_fd(struct xn_bridge *b, uint32_t port, int fd);
int xn_netdev_xsk_stats(struct xn_bridge *b, uint32_t port, uint32_t queue, struct xn_xsk_stats *out);

/* ---- bpf(2), as far as steering needs it ---- */

int xn_bpf_map_update(int map_fd, const void *key, const void *value);
int xn_bpf_map_delete(int map_fd, const void *key);
int xn_bpf_map_lookup(int map_fd, const void *key, void *value);
/* BPF_PROG_LOAD of an XDP program for frames in fragments: a program fd. `instructions` are n times 8 bytes. */
int xn_bpf_xdp_load_frags(const void *instructions, uint32_t n, const char *license);
int xn_bpf_xdp_link(int prog_fd, uint32_t ifindex, uint32_t flags); /* BPF_LINK_CREATE: a link fd */
int xn_bpf_link_ifindex(int link_fd);				    /* 0: the interface is gone */
