/*
 * The dirty log: which pages of its guest a frontend has to copy once more, for it moves the guest to another host.
 *
 * A bitmap in memory of the frontend's, with a bit for each page by its guest physical address. The frontend fetches and
 * clears bits while we set them, and reads a page after that: so a bit is set once the bytes are there, else it could be
 * fetched before they are. What a guest learns by another word (frames and used elements by the used index, or by the flags of
 * the first packed descriptor) is marked before that word is written, and the word itself right behind. When a ring has
 * stopped all marks of it are set; what was written and not marked by one that died on the way lies in the ring, all of
 * which is marked when somebody begins to log it.
 *
 * vhost-user, "Migration"; QEMU hw/virtio/vhost.c, vhost_dev_sync_region(). A log in a file that is truncated under us is
 * lost as guest memory is (mem.h).
 */
#ifndef XN_DIRTY_H
#define XN_DIRTY_H

#include "mem.h"

enum { DIRTY_PAGE = 4096 }; /* VHOST_LOG_PAGE */

struct dirty_log {
	u8 *bits;
	u64 length; /* bytes */
	struct mapping map;
	struct mem_alarms alarms;
};

/* NULL: errno. The file stays the caller's. */
struct dirty_log *dirty_open(int fd, u64 offset, u64 size);
void dirty_close(struct dirty_log *log);

/* Whether there is a bit for each page of these guest physical addresses. */
static inline bool dirty_covers(const struct dirty_log *log, u64 addr, u64 len)
{
	return addr + len >= addr && (addr + len + DIRTY_PAGE - 1) / DIRTY_PAGE <= log->length * 8;
}

/* Whether there is one for each page of the table. */
bool dirty_covers_all(const struct dirty_log *log, const struct mem *m);

static inline void dirty_mark(const struct dirty_log *log, u64 addr, u64 len)
{
	if (unlikely(!len || !dirty_covers(log, addr, len)))
		return;
	for (u64 page = addr / DIRTY_PAGE; page <= (addr + len - 1) / DIRTY_PAGE; page++) {
		/* Release: the bytes are there before the bit is. */
		__atomic_fetch_or(&log->bits[page / 8], (u8)(1u << page % 8), __ATOMIC_RELEASE);
	}
}

/* What lies there in memory of ours. */
static inline void dirty_mark_at(const struct dirty_log *log, const struct mem *m, const u8 *ptr, u64 len)
{
	u64 addr;

	if (likely(mem_guest(m, ptr, &addr)))
		dirty_mark(log, addr, len);
}

static inline bool dirty_is_lost(const struct dirty_log *log)
{
	return __atomic_load_n(&log->alarms.lost, __ATOMIC_RELAXED);
}

#endif
