package rpcjson

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Lifetimes of nonces, and how many used ones are remembered.
const (
	headerNonceLife = 5 * time.Minute
	frameNonceLife  = 2 * time.Minute // below 256 s, see below
	maxUsedNonces   = 4096
	nonceWindow     = 64 // by how much requests with one nonce may overtake another
)

// nonces issues nonces and knows its own again. It keeps nothing about those that
// were only issued, so that nobody can fill its memory. A nonce is valid for the
// peer it was issued to, and for a while.
//
// In a header it is time, number and MAC. In a frame it must be a number, which
// clients may hold in a double (2^53): a one, 8 bits of the time in seconds, 12
// bits of a counter and 32 bits of the MAC, which covers the whole time.
type nonces struct {
	start time.Time // the monotonic clock: setting the date changes nothing

	mu    sync.Mutex
	key   [32]byte
	n     uint64
	used  map[string]*use
	floor time.Duration // older ones are no longer told from used ones
}

// use is what is known of a nonce that somebody has proven a password with.
type use struct {
	issued time.Duration
	top    uint64 // highest count
	seen   uint64 // bit i: top-i was used
}

func newNonces() *nonces {
	n := &nonces{start: time.Now(), used: map[string]*use{}}
	_, _ = rand.Read(n.key[:]) // never fails
	var b [2]byte
	_, _ = rand.Read(b[:])
	n.n = uint64(binary.BigEndian.Uint16(b[:]))
	return n
}

// reset makes all nonces issued so far invalid.
func (n *nonces) reset() {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, _ = rand.Read(n.key[:]) // never fails
	clear(n.used)
}

func (n *nonces) next() (age time.Duration, number uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.n++
	return time.Since(n.start), n.n
}

// mac authenticates a nonce of the given kind for peer.
func (n *nonces) mac(kind byte, issued, number uint64, peer string) []byte {
	n.mu.Lock()
	key := n.key
	n.mu.Unlock()
	h := hmac.New(sha256.New, key[:])
	b := []byte{kind}
	b = binary.BigEndian.AppendUint64(b, issued)
	b = binary.BigEndian.AppendUint64(b, number)
	h.Write(append(b, peer...))
	return h.Sum(nil)
}

// header returns a nonce for the header WWW-Authenticate.
func (n *nonces) header(peer string) string {
	issued, number := n.next()
	b := binary.BigEndian.AppendUint64(nil, uint64(issued))
	b = binary.BigEndian.AppendUint64(b, number)
	return base64.RawURLEncoding.EncodeToString(append(b, n.mac('h', uint64(issued), number, peer)[:16]...))
}

// frame returns a nonce for the challenge in a frame.
func (n *nonces) frame(peer string) uint64 {
	issued, number := n.next()
	secs := uint64(issued / time.Second)
	number &= 0xfff
	mac := binary.BigEndian.Uint32(n.mac('f', secs, number, peer))
	return 1<<52 | secs&0xff<<44 | number<<32 | uint64(mac)
}

// checkHeader reports when a nonce was issued to peer, and whether it was.
func (n *nonces) checkHeader(nonce, peer string) (issued time.Duration, ok bool) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(nonce)
	if err != nil || len(b) != 32 {
		return 0, false
	}
	t, number := binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
	ok = subtle.ConstantTimeCompare(b[16:], n.mac('h', t, number, peer)[:16]) == 1
	return time.Duration(t), ok && time.Since(n.start)-time.Duration(t) <= headerNonceLife
}

// checkFrame is checkHeader for nonces of frames.
func (n *nonces) checkFrame(nonce, peer string) (issued time.Duration, ok bool) {
	v, err := strconv.ParseUint(nonce, 10, 53)
	if err != nil || v>>52 != 1 || nonce[0] == '0' {
		return 0, false
	}
	now := uint64(time.Since(n.start) / time.Second)
	secs := now - (now-v>>44)&0xff
	var mac [4]byte
	binary.BigEndian.PutUint32(mac[:], uint32(v))
	ok = secs <= now && subtle.ConstantTimeCompare(mac[:], n.mac('f', secs, v>>32&0xfff, peer)[:4]) == 1
	issued = time.Duration(secs) * time.Second
	return issued, ok && time.Since(n.start)-issued <= frameNonceLife
}

// spend marks a count of a nonce as used. It returns false if it was, or if that
// is no longer known.
func (n *nonces) spend(nonce string, issued time.Duration, count uint64) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	u := n.used[nonce]
	if u == nil {
		if issued < n.floor {
			return false
		}
		if len(n.used) >= maxUsedNonces {
			n.forget()
			if issued < n.floor {
				return false
			}
		}
		u = &use{issued: issued}
		n.used[nonce] = u
	}
	switch {
	case count > u.top:
		u.seen = u.seen<<(count-u.top) | 1
		u.top = count
		return true
	case u.top-count >= nonceWindow || u.seen>>(u.top-count)&1 == 1:
		return false
	}
	u.seen |= 1 << (u.top - count)
	return true
}

// forget forgets the older half of the used nonces. n.mu is held.
func (n *nonces) forget() {
	times := make([]time.Duration, 0, len(n.used))
	for _, u := range n.used {
		times = append(times, u.issued)
	}
	slices.Sort(times)
	n.floor = times[len(times)/2] + 1
	for k, u := range n.used {
		if u.issued < n.floor {
			delete(n.used, k)
		}
	}
}
