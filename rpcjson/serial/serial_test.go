package serial_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/serial"
)

// newServer returns a server of a device whose updates end up in got.
func newServer(t testing.TB, got *bytes.Buffer) *rpcjson.Server {
	var slots []ota.Slot
	for range 2 {
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "app", Flash: memflash.New(memflash.Config{Size: 64 << 10, EraseSize: 4096})}}})
	}
	places, err := bootrecord.Split(memflash.New(memflash.Config{Size: 16 << 10, EraseSize: 4096}), 3)
	require.NoError(t, err)
	rec, err := bootrecord.New(places, &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	require.NoError(t, err)
	require.NoError(t, rec.Store(t.Context(), ota.BootState{Committed: true, Revert: ota.NoSlot}))
	dev, err := ota.Open(t.Context(), rec, slots, &ota.Options{Platform: "p", Reset: func(context.Context) error { return nil }})
	require.NoError(t, err)
	srv, err := rpcjson.New(dev, rpcjson.Options{ID: "d", NoAuth: true, Open: func(_ context.Context, r io.Reader) (ota.Image, error) {
		got.Reset()
		if _, err := io.Copy(got, r); err != nil {
			return nil, err
		}
		return nil, errors.New("not a bundle")
	}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, srv.Close()) })
	return srv
}

// push pushes data and requires that all of it arrives, although it is no bundle.
func push(t testing.TB, c *rpcjson.Client, got *bytes.Buffer, data []byte) {
	t.Helper()
	err := c.Push(t.Context(), bytes.NewReader(data), int64(len(data)), nil)
	require.ErrorContains(t, err, "not a bundle")
	require.True(t, bytes.Equal(data, got.Bytes()))
}

func testData(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * i >> 5)
	}
	return b
}

// The port is unplugged and comes back, and is not there for a while.
func TestServeReopens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got bytes.Buffer
		srv := newServer(t, &got)
		var opened []time.Duration
		start := time.Now()
		ports := make(chan net.Conn, 1)
		o := &serial.Options{Open: func(name string, o *serial.Options) (io.ReadWriteCloser, error) {
			require.Equal(t, "/dev/ttyX", name)
			require.Equal(t, 115200, o.BaudRate)
			opened = append(opened, time.Since(start))
			if n := len(opened); n > 1 && n < 8 {
				return nil, fs.ErrNotExist
			}
			mine, theirs := net.Pipe()
			ports <- mine
			return theirs, nil
		}}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- serial.Serve(ctx, srv, "/dev/ttyX", o) }()
		for i := range 2 {
			port := <-ports
			c := rpcjson.NewClient(rpcjson.NewStreamOf(port, rpcjson.SerialStream()), nil)
			var where struct {
				Info string `json:"channel_info"`
			}
			require.NoError(t, c.Call(t.Context(), "RPC.Ping", nil, &where))
			require.Equal(t, "UART0", where.Info)
			require.NoError(t, c.Close()) // unplugged
			if i == 0 {
				require.Len(t, opened, 1)
			}
		}
		s := time.Second
		require.Equal(t, []time.Duration{0, s, 3 * s, 7 * s, 15 * s, 31 * s, 61 * s, 91 * s}, opened)
		cancel()
		require.ErrorIs(t, <-ended, context.Canceled)
		require.ErrorIs(t, serial.Serve(t.Context(), srv, "x", &serial.Options{BaudRate: -1}), ota.ErrInvalid)
		require.ErrorIs(t, serial.Serve(t.Context(), srv, "x", &serial.Options{FlowControl: 9}), ota.ErrInvalid)
	})
}

// A client opens the port again after it was lost, and goes on.
func TestChannelReopens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got bytes.Buffer
		srv := newServer(t, &got)
		opens := 0
		ch, err := serial.NewChannel("COM7", &serial.Options{Open: func(string, *serial.Options) (io.ReadWriteCloser, error) {
			if opens++; opens == 2 {
				return nil, fs.ErrNotExist
			}
			mine, theirs := net.Pipe()
			go srv.ServeStream(t.Context(), theirs, rpcjson.Peer{}, rpcjson.SerialStream())
			time.AfterFunc(100*time.Millisecond, func() {
				if opens == 1 {
					mine.Close()
				}
			})
			return slow{mine}, nil
		}})
		require.NoError(t, err)
		c := rpcjson.NewClient(ch, nil)
		defer c.Close()
		push(t, c, &got, testData(10000))
		require.Equal(t, 3, opens)
	})
}

// slow takes 10 ms for each write.
type slow struct{ net.Conn }

func (s slow) Write(b []byte) (int, error) {
	time.Sleep(10 * time.Millisecond)
	return s.Conn.Write(b)
}

func TestDialURL(t *testing.T) {
	for in, want := range map[string]string{
		"serial:///dev/ttyUSB0":                                 "",
		"serial:///dev/ttyUSB0?baud=9600&flow=hardware&pace=16": "",
		"serial://COM7":                                         "",
		"serial://":                                             "need serial:///dev/PORT or serial://COMn",
		"serial://host/dev/ttyS0":                               "need serial:///dev/PORT or serial://COMn",
		"serial://user:secret@COM1":                             "need serial:///dev/PORT or serial://COMn",
		"serial:///x?baud=fast":                                 `baud "fast": need a number`,
		"serial:///x?baud=-1":                                   `baud "-1": need a number`,
		"serial:///x?baud=100000000":                            "serial: 100000000 baud: " + ota.ErrInvalid.Error(),
		"serial:///x?flow=up":                                   `flow "up": need xonxoff, hardware, none`,
		"serial:///x?pace=0":                                    `pace "0": need a number of bytes`,
		"serial:///x?parity=even":                               `"parity": need baud, flow or pace`,
		"serial:///x?%zz":                                       "bad query",
		fmt.Sprintf("serial:///x?flow=none&baud=%d", 20_000_000): "",
	} {
		u, err := url.Parse(in)
		require.NoError(t, err)
		ch, err := serial.Dial(t.Context(), u, &rpcjson.ClientOptions{})
		if want != "" {
			require.EqualError(t, err, want, in)
			continue
		}
		require.NoError(t, err, in)
		require.NoError(t, ch.Close())
	}
	c, err := rpcjson.Dial(t.Context(), "serial:///no/such/port", &rpcjson.ClientOptions{Dialers: map[string]rpcjson.Dialer{"serial": serial.Dial}})
	require.NoError(t, err)
	require.ErrorIs(t, c.Call(t.Context(), "RPC.Ping", nil, nil), fs.ErrNotExist)
	require.NoError(t, c.Close())
}
