#define _GNU_SOURCE
#include "staging.h"

#include <linux/magic.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

enum {
	PAGE = 4096,
	DIRECTORY = 1 << 21, /* bytes that an entry of a page middle directory stands for */
	PART = 1 << 26,	     /* unmapped at a time */
	MOST = 64	     /* wait to be unmapped; more are at once, at the expense of who unmaps */
};

static struct leftover {
	struct leftover *next;
	u8 *base;
	u64 length;
	bool huge;
} * leftovers;
static u32 leftovers_n;
static bool emptying; /* a thread is there for them */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int staging_extent(const struct xn_region *region, struct extent *e)
{
	struct stat st;
	struct statfs fs;

	if (fstat(region->fd, &st) < 0 || fstatfs(region->fd, &fs) < 0)
		return -errno;
	if (region->size > UINT64_MAX / 2 || region->offset > UINT64_MAX / 2 ||
	    region->offset + region->size > (u64)st.st_size)
		return -EINVAL;
	/* hugetlbfs maps whole huge pages only, and reports their size as its block size. */
	e->page = st.st_blksize > PAGE ? (u64)st.st_blksize : PAGE;
	e->start = region->offset / e->page * e->page;
	e->lead = region->offset - e->start;
	e->length = (e->lead + region->size + e->page - 1) / e->page * e->page;
	e->huge = fs.f_type == HUGETLBFS_MAGIC;
	return 0;
}

u64 staging_alignment(u64 page)
{
	return page > DIRECTORY ? page : DIRECTORY;
}

/* Address space at an address that is `start` modulo `alignment`; what is asked for is mapped over it. */
static u8 *reserve(u64 length, u64 start, u64 alignment)
{
	u8 *all = mmap(NULL, length + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (all == MAP_FAILED)
		return NULL;
	u64 lead = (start - (uintptr_t)all) % alignment;

	if (lead)
		munmap(all, lead);
	munmap(all + lead + length, alignment - lead);
	return all + lead;
}

u8 *staging_map(const struct extent *e, int fd)
{
	u8 *base = reserve(e->length, e->start, staging_alignment(e->page));
	const int flags = MAP_SHARED | MAP_NORESERVE | MAP_FIXED;

	if (!base)
		return NULL;
	if (mmap(base, e->length, PROT_READ | PROT_WRITE, flags, fd, (off_t)e->start) == MAP_FAILED) {
		int error = errno;

		munmap(base, e->length);
		errno = error;
		return NULL;
	}
	/* A core dump is not the place for a guest's memory. Only advice: a refusal changes nothing else. */
	(void)madvise(base, e->length, MADV_DONTDUMP);
	return base;
}

u8 *staging_move(u8 *base, u64 length, u64 start, u8 *to)
{
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (to ? 0 : MREMAP_DONTUNMAP);
	u8 *place = to ? to : reserve(length, start, DIRECTORY);

	if (!place)
		return NULL;
	if (mremap(base, length, length, flags, place) == place)
		return place;
	if (!to)
		munmap(place, length);
	return NULL;
}

static void empty(u8 *base, u64 length, bool huge)
{
	const u64 part = huge ? length : PART;

	for (u64 at = 0; at < length; at += part)
		munmap(base + at, length - at < part ? length - at : part);
}

static void *empty_all(void *unused)
{
	for (;;) {
		pthread_mutex_lock(&lock);
		struct leftover *l = leftovers;

		if (l)
			leftovers = l->next;
		emptying = l;
		pthread_mutex_unlock(&lock);
		if (!l)
			return unused;
		empty(l->base, l->length, l->huge);
		free(l);
		pthread_mutex_lock(&lock);
		leftovers_n--;
		pthread_mutex_unlock(&lock);
	}
}

/* False: there is no thread to be had. */
static bool start_emptying(void)
{
	sigset_t all, before;
	pthread_t thread;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	bool started = !pthread_create(&thread, NULL, empty_all, NULL);

	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (started)
		pthread_detach(thread);
	return started;
}

void staging_unmap(u8 *base, u64 length, bool huge)
{
	struct leftover *l = length > PART ? malloc(sizeof(*l)) : NULL;
	bool queued = false, start = false;

	if (l) {
		*l = (struct leftover){.base = base, .length = length, .huge = huge};
		pthread_mutex_lock(&lock);
		if (leftovers_n < MOST) {
			l->next = leftovers;
			leftovers = l;
			leftovers_n++;
			queued = true;
			start = !emptying;
			emptying = true;
		}
		pthread_mutex_unlock(&lock);
	}
	if (!queued) {
		empty(base, length, huge);
		free(l);
	} else if (start && !start_emptying()) {
		empty_all(NULL);
	}
}

int xn_staged_open(const struct xn_region *region, struct xn_staged *staged)
{
	struct extent e;
	int r = staging_extent(region, &e);

	if (r < 0)
		return r;
	u8 *base = staging_map(&e, region->fd);

	if (!base)
		return -errno;
	*staged = (struct xn_staged){(uintptr_t)base, e.length, e.huge};
	return 0;
}

int xn_staged_fill(const struct xn_staged *staged, uint64_t from, uint64_t length)
{
	u8 *base = (u8 *)(uintptr_t)staged->base;

	if (from > staged->length || length > staged->length - from)
		return -EINVAL;
	return madvise(base + from, length, MADV_POPULATE_WRITE) < 0 ? -errno : 0;
}

void xn_staged_close(const struct xn_staged *staged)
{
	staging_unmap((u8 *)(uintptr_t)staged->base, staged->length, staged->huge);
}
