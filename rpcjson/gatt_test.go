package rpcjson

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// radio connects a central to a peripheral.
type radio struct {
	g      *GATTServer
	mtu    int // bytes of a read
	cut    error
	writes []int
}

func (r *radio) WriteCharacteristic(_ context.Context, uuid string, value []byte) error {
	r.writes = append(r.writes, len(value))
	if r.cut != nil {
		return r.cut
	}
	return r.g.Write(uuid, value)
}

func (r *radio) ReadCharacteristic(_ context.Context, uuid string) ([]byte, error) {
	return r.g.Read(uuid, r.mtu)
}

func (r *radio) Close() error { return r.g.Close() }

func u32(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

func TestGATTPush(t *testing.T) {
	for _, notified := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			d := newFake()
			s := newTest(t, d, nil)
			var c *GATT
			r := &radio{mtu: 22}
			r.g = s.NewGATTServer(t.Context(), Peer{Addr: "aa:bb"}, func(v []byte) {
				if notified {
					c.Notified()
				}
			})
			c = NewGATT(r, 0)
			client := NewClient(c, nil)
			defer client.Close()
			data := pushData(10000)
			start := time.Now()
			require.NoError(t, client.Push(t.Context(), bytes.NewReader(data), int64(len(data)), nil))
			require.Equal(t, data, d.got)
			require.LessOrEqual(t, slices.Max(r.writes), 20)
			if notified {
				require.Zero(t, time.Since(start))
			}
			var e *Error
			require.ErrorAs(t, client.Call(t.Context(), "X.Y", nil, nil), &e)
			var where struct {
				Info string `json:"channel_info"`
			}
			require.NoError(t, client.Call(t.Context(), "RPC.Ping", nil, &where))
			require.Equal(t, "aa:bb", where.Info)
		})
	}
}

// The peripheral keeps to the protocol, whatever the central does.
func TestGATTServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		var notes [][]byte
		g := s.NewGATTServer(t.Context(), Peer{}, func(v []byte) { notes = append(notes, v) })
		defer g.Close()
		read := func(uuid string, n int) string {
			b, err := g.Read(uuid, n)
			require.NoError(t, err)
			return string(b)
		}
		ask := func() {
			require.NoError(t, g.Write(GATTTxCtl, u32(uint32(len(askState)))))
			require.NoError(t, g.Write(GATTData, []byte(askState[:9])))
			require.NoError(t, g.Write(GATTData, []byte(askState[9:])))
			synctest.Wait()
		}
		require.Equal(t, string(u32(0)), read(GATTRxCtl, 99))
		require.Empty(t, read(GATTData, 99))

		// A new length clears a frame that is half written.
		require.NoError(t, g.Write(GATTTxCtl, u32(100)))
		require.NoError(t, g.Write(GATTData, []byte("half")))
		ask()
		require.Equal(t, string(u32(uint32(len(stateReply)))), read(GATTRxCtl, 99))
		require.Equal(t, [][]byte{u32(uint32(len(stateReply)))}, notes)
		require.Equal(t, stateReply[:5], read(GATTData, 5))
		require.Equal(t, string(u32(uint32(len(stateReply)-5))), read(GATTRxCtl, 99))
		require.Equal(t, stateReply[5:], read(GATTData, 999))
		require.Empty(t, read(GATTData, 99))

		for _, v := range [][]byte{nil, {1}, {0, 0, 0, 1, 0}, u32(0), u32(DefaultMaxFrame + 1), u32(1 << 31)} {
			require.ErrorIs(t, g.Write(GATTTxCtl, v), ErrGATT, "%v", v)
			require.ErrorIs(t, g.Write(GATTData, []byte("x")), ErrGATT)
		}
		require.ErrorIs(t, g.Write(GATTTxCtl, u32(DefaultMaxFrame+1)), ota.ErrTooLarge)
		require.NoError(t, g.Write(GATTTxCtl, u32(3)))
		require.ErrorIs(t, g.Write(GATTData, []byte("four")), ErrGATT)
		require.ErrorIs(t, g.Write(GATTRxCtl, u32(3)), ErrGATT)
		_, err := g.Read(GATTTxCtl, 9)
		require.ErrorIs(t, err, ErrGATT)

		// Noise is not answered, and replies that nobody reads are bounded.
		noise := noise()[:1000]
		require.NoError(t, g.Write(GATTTxCtl, u32(1000)))
		require.NoError(t, g.Write(GATTData, noise))
		synctest.Wait()
		require.Equal(t, string(u32(0)), read(GATTRxCtl, 99))
		for range maxGATT {
			ask()
		}
		require.ErrorIs(t, g.Write(GATTTxCtl, u32(9)), ota.ErrBusy)
		require.Equal(t, stateReply, read(GATTData, 999))
		ask()
		for range maxGATT {
			require.Equal(t, stateReply, read(GATTData, 999))
		}
	})
}

// Every reply is notified when it is the next to be read, one at a time.
func TestGATTNotify(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		var notes []string
		g := s.NewGATTServer(t.Context(), Peer{}, func(v []byte) { notes = append(notes, string(v)) })
		var replies []string
		for _, call := range []string{askState, `{"id":1,"method":"X"}`, `{"id":22,"method":"X"}`} {
			require.NoError(t, g.Write(GATTTxCtl, u32(uint32(len(call)))))
			require.NoError(t, g.Write(GATTData, []byte(call)))
			synctest.Wait()
			b, err := s.Call(t.Context(), Peer{}, []byte(call))
			require.NoError(t, err)
			replies = append(replies, string(b))
		}
		read := func(n int) string {
			b, err := g.Read(GATTData, n)
			require.NoError(t, err)
			synctest.Wait()
			return string(b)
		}
		length := func(reply string) string { return string(u32(uint32(len(reply)))) }
		want := []string{length(replies[0])}
		require.Equal(t, want, notes)
		first := read(7)
		require.Equal(t, want, notes, "not all of it has been read")
		require.Equal(t, replies[0], first+read(999))
		want = append(want, length(replies[1]))
		require.Equal(t, want, notes)
		require.Equal(t, replies[1], read(999))
		want = append(want, length(replies[2]))
		require.Equal(t, want, notes)
		require.Equal(t, replies[2], read(999))
		require.Empty(t, read(999))
		require.Equal(t, want, notes)

		// Not any more once it is closed.
		for range 2 {
			require.NoError(t, g.Write(GATTTxCtl, u32(uint32(len(askState)))))
			require.NoError(t, g.Write(GATTData, []byte(askState)))
			synctest.Wait()
		}
		want = append(want, length(stateReply))
		require.NoError(t, g.Close())
		require.Equal(t, stateReply, read(999))
		require.Equal(t, want, notes)
		require.ErrorIs(t, g.Write(GATTTxCtl, u32(9)), context.Canceled)
	})
}

// Nothing is begun once Close waits, and Close waits for all that was begun.
func TestGATTWriteAgainstClose(t *testing.T) {
	s := newTest(t, newFake(), nil)
	for range 200 {
		g := s.NewGATTServer(t.Context(), Peer{}, nil)
		require.NoError(t, g.Write(GATTTxCtl, u32(uint32(len(askState)))))
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := g.Write(GATTData, []byte(askState)); err != nil {
				assert.ErrorIs(t, err, context.Canceled)
			}
		})
		require.NoError(t, g.Close())
		g.mu.Lock()
		calls := g.calls
		g.mu.Unlock()
		require.Zero(t, calls)
		wg.Wait()
	}
}

// The central copes with stale, wrong and too long replies.
func TestGATTClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		require.NoError(t, s.Handle("Slow", "", Read, func(context.Context, *Request) (any, error) {
			time.Sleep(30 * time.Second)
			return "slow", nil
		}))
		require.NoError(t, s.Handle("Long", "", Read, func(context.Context, *Request) (any, error) {
			return strings.Repeat("x", 2000), nil
		}))
		r := &radio{mtu: 100, g: s.NewGATTServer(t.Context(), Peer{}, nil)}
		c := NewClient(NewGATT(r, 100), &ClientOptions{MaxReply: 1000})
		defer c.Close()
		require.ErrorIs(t, c.Call(t.Context(), "Slow", nil, nil), context.DeadlineExceeded)
		time.Sleep(15 * time.Second) // the reply comes, to nobody
		_, err := c.BootState(t.Context())
		require.NoError(t, err)
		require.ErrorIs(t, c.Call(t.Context(), "Long", nil, nil), ota.ErrTooLarge)
		_, err = c.BootState(t.Context())
		require.NoError(t, err)
		r.cut = errors.New("out of reach")
		require.ErrorIs(t, c.Call(t.Context(), "RPC.Ping", nil, nil), ErrNoReply)
		r.cut = nil
		r.mtu = 0 // reads that give nothing
		require.ErrorIs(t, c.Call(t.Context(), "RPC.Ping", nil, nil), ErrBadReply)
	})
}

// Whatever is written, and however it is cut, at most one frame is kept.
func FuzzGATT(f *testing.F) {
	f.Add([]byte(fmt.Sprintf("\x05%s\x14%s", u32(20), askState[:20])))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := newTest(t, newFake(), nil)
		g := s.NewGATTServer(t.Context(), Peer{}, nil)
		for len(b) > 0 {
			n := min(int(b[0]>>1), len(b)-1)
			uuid := GATTTxCtl
			if b[0]&1 != 0 {
				uuid = GATTData
			}
			_ = g.Write(uuid, b[1:1+n])
			b = b[1+n:]
			if cap(g.got) > 2*DefaultMaxFrame {
				t.Fatal("too much is kept")
			}
		}
		g.Close()
		if len(g.replies) > maxGATT {
			t.Fatal("too many replies")
		}
	})
}
