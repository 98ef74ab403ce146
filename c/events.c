#include "events.h"

#include <sys/eventfd.h>
#include <unistd.h>

int events_init(struct events *e)
{
	e->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	return e->fd < 0 ? -errno : caller_init(&e->caller);
}

void events_release(struct events *e)
{
	caller_release(&e->caller);
	if (e->fd >= 0)
		close(e->fd);
	e->fd = -1;
}

void events_tell(struct events *e, enum xn_event event)
{
	static const u64 one = 1;

	if (__atomic_fetch_or(&e->bits, event, __ATOMIC_ACQ_REL) & event)
		return;
	/* Does not block: a counter near its limit has been readable for long. */
	if (write(e->fd, &one, sizeof(one)) < 0)
		return;
}

u32 events_take(struct events *e)
{
	u64 ignored;

	/* The fd is cleared before the bits, so that a bit set in between signals it again. */
	if (read(e->fd, &ignored, sizeof(ignored)) < 0 && errno != EAGAIN)
		return 0;
	return __atomic_exchange_n(&e->bits, 0, __ATOMIC_ACQ_REL);
}

void events_call(struct events *e, int fd)
{
	if (fd < 0)
		return;
	spin_lock(&e->lock);
	caller_add(&e->caller, fd);
	caller_flush(&e->caller);
	spin_unlock(&e->lock);
}
