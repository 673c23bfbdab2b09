package link

import "sync"

// Buffers are spare buffers for long messages, which mostly come one after the
// other: to allocate and clear one for each costs more than to read it. The zero
// value is ready for use, by any number of goroutines. What is not used for a
// while is freed.
type Buffers struct{ pool sync.Pool }

// pooled is from which size on a buffer is worth keeping, in bytes.
const pooled = 4 << 10

// Get returns an empty buffer with room for n bytes.
func (b *Buffers) Get(n int) []byte {
	if n >= pooled {
		if p, _ := b.pool.Get().(*[]byte); p != nil && cap(*p) >= n {
			return (*p)[:0]
		}
	}
	return make([]byte, 0, n)
}

// Put takes back a buffer that nobody uses any more.
func (b *Buffers) Put(buf []byte) {
	if cap(buf) >= pooled {
		b.pool.Put(&buf)
	}
}
