/*
 * Staging: guest memory is mapped and unmapped without keeping anybody waiting.
 *
 * To fill the page tables of a guest's memory, or to empty them, takes 20 to 200 ms for each GiB, and seconds where the
 * pages have to be made first. To move them takes nothing, if both places lie alike within what one entry of a page middle
 * directory covers (mremap(2), mm/mremap.c). So whoever has the time fills them elsewhere, before they become a window of
 * the arena; and what is unmapped is moved out of the way and emptied by a thread, in parts, none of which holds the lock
 * of the address space for longer than a few ms.
 */
#ifndef XN_STAGING_H
#define XN_STAGING_H

#include "base.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

/* What of its file a region takes, in bytes. */
struct extent {
	u64 start;
	u64 length;
	u64 lead; /* of the region in it */
	u64 page; /* all these are multiples of */
	bool huge;
};

int staging_extent(const struct xn_region *region, struct extent *e);
/* Where mappings of it move without a look at each page: at addresses that are `start` modulo this. */
u64 staging_alignment(u64 page);
/* NULL: errno says why. */
u8 *staging_map(const struct extent *e, int fd);
/*
 * Moves the mapping to `to`, in place of what is there, or, if that is NULL, to anywhere, which leaves the old place mapped
 * and empty; NULL: it is where it was.
 */
u8 *staging_move(u8 *base, u64 length, u64 start, u8 *to);
/* Soon. `huge`: it is on hugetlbfs. */
void staging_unmap(u8 *base, u64 length, bool huge);

#endif
