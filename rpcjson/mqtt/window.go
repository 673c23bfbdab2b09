package mqtt

import (
	"crypto/sha256"
	"time"
)

// How long a message is remembered. The broker marks those that it sends again;
// others are copies of a publisher that did not hear from it, or of overlapping
// subscriptions, and come soon. After that an equal message is a new one: not all
// clients number their calls.
const (
	marked   = 5 * time.Minute
	unmarked = time.Minute
)

// window remembers the newest messages, to tell copies from new ones.
type window struct {
	seen map[key]time.Time
	ring []mark // the oldest one is at next once it is full
	next int
	size int
}

type key [sha256.Size]byte

type mark struct {
	key key
	at  time.Time
}

func newWindow(size int) *window { return &window{seen: map[key]time.Time{}, size: size} }

func keyOf(topic string, payload []byte) (k key) {
	h := sha256.New()
	h.Write([]byte(topic))
	h.Write([]byte{0}) // in no topic
	h.Write(payload)
	h.Sum(k[:0])
	return k
}

// copied reports whether the message came within the last d, and else remembers
// it.
func (w *window) copied(k key, now time.Time, d time.Duration) bool {
	if at, ok := w.seen[k]; ok && now.Sub(at) < d {
		return true
	}
	w.seen[k] = now
	m := mark{k, now}
	if len(w.ring) < w.size {
		w.ring = append(w.ring, m)
		return false
	}
	old := w.ring[w.next]
	if w.seen[old.key].Equal(old.at) && old.key != k { // else it came again later
		delete(w.seen, old.key)
	}
	w.ring[w.next] = m
	w.next = (w.next + 1) % w.size
	return false
}
