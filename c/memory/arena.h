/*
 * The arena: one reservation of address space that is the UMEM of the process.
 *
 *   base                                                                                     base + reserved
 *   | sets of private frames | window | hole | window | ... nothing is mapped behind the last window ... |
 *
 * A window is the mapping of a guest's memory region, the data path's own: the UMEM address of a byte is its pointer less
 * base. What a socket registers is a UMEM of its time: number 0 has the private frames alone, any other number stands for
 * the windows as they were when `changes` had that value. A hole is filled for as long as a registration takes, by one
 * small file mapped again and again. Documentation/networking/af_xdp.rst, "XDP_UMEM_REG".
 *
 * What is pinned stays pinned, also when the guest gives the page up and takes another in its place (a balloon, free page
 * reporting, virtio-mem): from then on a socket would send what the old one holds. So a window's page tables are full from
 * the start, and every page that leaves them, as the old one has to, is watched (userfaultfd): whoever touches it next gets
 * a SIGBUS before he gets the new page, and the guest's alarm says that nothing of its memory is to be lent any more.
 * Without that the arena takes no windows. ioctl_userfaultfd(2).
 */
#ifndef XN_ARENA_H
#define XN_ARENA_H

#include "base.h"

struct arena;
struct xsk;

/* What the SIGBUS handler raises, of all memory of a guest. */
struct mem_alarms {
	u32 lost;  /* some of it was taken away */
	u32 moved; /* enum mem_moved: some of it is not where it was when it was pinned */
};

enum mem_moved { MEM_IN_PLACE, MEM_MOVED, MEM_MOVED_TOLD };

/* One mmap of a region's file, shared by every table that holds the region. */
struct mapping {
	u8 *base;
	size_t length;
	u32 refs;
	struct mem_alarms *alarms;
	bool huge;	     /* on hugetlbfs: its pages are there to stay */
	struct arena *arena; /* that it is a window of; NULL: of none */
	u64 umem;	     /* the first UMEM that has it */
	int fd;		     /* of a window: its file, and where in that it begins */
	u64 offset;
};

struct arena {
	u8 *base;
	u64 set_size; /* bytes of a set of frames */
	u32 sets;
	u32 frames;	    /* per set, a power of two */
	struct xsk **owner; /* per set; NULL: free */
	u64 length;	    /* bytes that are mapped at base, windows included */

	enum xn_zerocopy zerocopy; /* OFF: no window is taken, nor is one in any UMEM */
	bool spoiled; /* behind the private frames some of the reservation is no more ours: then it is OFF */
	int watch;    /* userfaultfd; -1: none, and no windows */
	struct mapping **windows; /* by address */
	u32 windows_n;
	u32 windows_room;
	u64 changes; /* made to the windows so far */

	/* A UMEM that is registered already, for the next socket that wants it; fd -1: none. */
	struct umem {
		int fd;
		u64 number;
		bool metadata;
		bool rings; /* have their sizes */
		int shared; /* the socket that it is registered with, whose it is; -1: with this one */
	} ready;
};

/* Reserves room for windows unless zerocopy is off; without that, or a watch, it does with private frames. */
int arena_init(struct arena *a, u32 sets, u32 frames, enum xn_zerocopy zerocopy);
void arena_release(struct arena *a);

/* Whether memory of this kind has its place in a window. */
bool arena_wants(const struct arena *a, bool huge);
/*
 * Whether every page of the file is there, as far as one number tells (SEEK_HOLE knows none on hugetlbfs): pinning takes
 * the others from the host, and they would be charged to us.
 */
bool arena_is_whole(int fd);
/*
 * Moves what is filled at *staged, which is NULL then, into a window, and fills base and arena; -ENOSPC: no room, or a sparse
 * file: leave it at *staged, or, if that is NULL, map it elsewhere.
 */
int arena_map(struct arena *a, struct mapping *map, int fd, u64 offset, u64 page, u8 **staged);
/* The mapping is a window no more; where it is now, to be unmapped, or NULL: nowhere. */
u8 *arena_unmap(struct arena *a, struct mapping *map);

/* From the SIGBUS handler: the window is watched no more; whether the page at `fault` is there now. */
bool arena_unwatch(int watch, u8 *base, u64 length, u8 *fault);

/* The UMEM that a socket opened now would have, with windows or without. */
u64 arena_umem(const struct arena *a, bool windows);
/* Its length, from base. */
u64 arena_umem_length(const struct arena *a, u64 umem);
/* Around the registration of a UMEM with windows: nothing in it may be without a page; and undone, for it is pinned. */
int arena_fill_holes(struct arena *a);
void arena_empty_holes(struct arena *a);
/* After a registration that failed: raises the alarm of windows that have lost a page; whether there are any. */
bool arena_find_moved(const struct arena *a);

static inline u64 arena_private(const struct arena *a)
{
	return a->set_size * a->sets;
}

#endif
