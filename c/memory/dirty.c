#define _GNU_SOURCE
#include "dirty.h"

#include <stdlib.h>

#include "staging.h"

struct dirty_log *dirty_open(int fd, u64 offset, u64 size)
{
	const struct xn_region file = {.size = size, .offset = offset, .fd = fd};
	struct extent e;
	int r = size ? staging_extent(&file, &e) : -EINVAL;
	struct dirty_log *log = r < 0 ? NULL : calloc(1, sizeof(*log));

	if (!log) {
		errno = r < 0 ? -r : ENOMEM;
		return NULL;
	}
	log->map = (struct mapping){
		.base = staging_map(&e, fd), .length = e.length, .alarms = &log->alarms, .huge = e.huge, .fd = -1};
	if (!log->map.base)
		goto no_map;
	r = mem_guard(&log->map);
	if (r < 0)
		goto no_guard;
	log->bits = log->map.base + e.lead;
	log->length = size;
	return log;
no_guard:
	errno = -r;
	staging_unmap(log->map.base, log->map.length, log->map.huge);
no_map:
	free(log);
	return NULL;
}

void dirty_close(struct dirty_log *log)
{
	if (!log)
		return;
	mem_unguard(&log->map);
	staging_unmap(log->map.base, log->map.length, log->map.huge);
	free(log);
}

bool dirty_covers_all(const struct dirty_log *log, const struct mem *m)
{
	for (u32 i = 0; m && i < m->n; i++)
		if (!dirty_covers(log, m->regions[i].guest_addr, m->regions[i].size))
			return false;
	return true;
}
