package watchdog

import (
	"context"
	"errors"
	"math"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// fake is a driver as the kernel's core presents it.
type fake struct {
	options  uint32
	boot     uint32
	limits   [2]int32 // of the timeout
	now      int32
	nowayout bool
	old      bool // does not know WDIOC_SETOPTIONS
	fail     error

	running, magic, closed bool
	fed                    int
}

var errUnknown = errors.New("inappropriate ioctl for device")

func newFake() *fake {
	return &fake{options: settable | magicClose | pretimeout, limits: [2]int32{1, 16}, now: 60, running: true}
}

func (f *fake) support() (uint32, string, error) { return f.options, "Fake", f.fail }
func (f *fake) bootStatus() (uint32, error)      { return f.boot, nil }
func (f *fake) timeout() (int32, error)          { return f.now, nil }
func (f *fake) keepalive() error                 { f.fed++; return nil }

func (f *fake) setTimeout(n int32) (int32, error) {
	if n > 1000 {
		return 0, errUnknown
	}
	f.now = min(max(n, f.limits[0]), f.limits[1])
	return n, nil
}

func (f *fake) disable() error {
	switch {
	case f.old:
		return errUnknown
	case f.nowayout:
		return errBusy
	}
	f.running = false
	return nil
}

func (f *fake) write(b byte) error {
	f.magic = b == 'V'
	return nil
}

func (f *fake) close() error {
	f.closed = true
	if !f.running {
		return nil // and it remembers the magic character
	}
	if (f.magic || f.options&magicClose == 0) && !f.nowayout {
		f.running = false
	}
	return nil
}

func TestTimeout(t *testing.T) {
	for _, tc := range []struct{ want, got time.Duration }{
		{0, time.Minute}, {10 * time.Second, 10 * time.Second}, {1500 * time.Millisecond, 2 * time.Second},
		{100 * time.Second, 16 * time.Second}, {1, time.Second},
	} {
		w, err := start(newFake(), &Options{Timeout: tc.want})
		require.NoError(t, err)
		require.Equal(t, tc.got, w.Timeout())
	}
	// A driver with a fixed one.
	f := newFake()
	f.options = magicClose
	w, err := start(f, &Options{Timeout: time.Second})
	require.NoError(t, err)
	require.Equal(t, time.Minute, w.Timeout())
	require.Equal(t, Info{Identity: "Fake", MagicClose: true}, w.Info())
}

// What cannot be used is stopped again.
func TestStartFails(t *testing.T) {
	for name, f := range map[string]*fake{
		"support": {fail: errUnknown, running: true}, "no timeout": {running: true}, "refused": newFake(),
	} {
		w, err := start(f, &Options{Timeout: 2000 * time.Second})
		require.Error(t, err, name)
		require.Nil(t, w)
		require.True(t, f.closed)
		require.False(t, f.running, name)
	}
}

func TestDisarm(t *testing.T) {
	for _, tc := range []struct {
		name    string
		change  func(*fake)
		keep    bool
		err     error
		running bool
	}{
		{"core", func(*fake) {}, false, nil, false},
		{"old driver", func(f *fake) { f.old = true }, false, nil, false},
		{"nowayout", func(f *fake) { f.nowayout = true }, false, ErrNoWayOut, true},
		{"kept", func(*fake) {}, true, nil, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFake()
			tc.change(f)
			w, err := start(f, &Options{KeepRunning: tc.keep})
			require.NoError(t, err)
			require.ErrorIs(t, w.Disarm(t.Context()), tc.err)
			if tc.running {
				require.Equal(t, 1, f.fed, "the next one has the whole time")
			}
			require.NoError(t, w.Close())
			require.NoError(t, w.Close())
			require.Equal(t, tc.running, f.running)
		})
	}
}

// Without Disarm it runs on, whatever went before.
func TestClose(t *testing.T) {
	f := newFake()
	f.magic = true // left by the program before
	f.boot = cardReset
	w, err := start(f, &Options{})
	require.NoError(t, err)
	require.True(t, w.Info().Reset)
	require.NoError(t, w.Keepalive(t.Context()))
	require.NoError(t, w.Close())
	require.True(t, f.running)
	require.Equal(t, 1, f.fed)

	f = newFake()
	w, err = start(f, &Options{})
	require.NoError(t, err)
	require.NoError(t, w.Disarm(t.Context()))
	require.NoError(t, w.Close())
	require.False(t, f.running)
	require.False(t, f.magic, "for the next program")
}

func TestOpen(t *testing.T) {
	var _ ota.Watchdog = (*Watchdog)(nil)
	_, err := Open("x", &Options{Timeout: -1})
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, err = Open("x", &Options{Timeout: math.MaxInt64})
	require.ErrorIs(t, err, ota.ErrInvalid)
	w, err := For(filepath.Join(t.TempDir(), "none"), nil)(context.Background())
	require.Error(t, err)
	require.Nil(t, w)
}
