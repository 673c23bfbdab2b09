package rpcjson_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/internal/replay"
	"github.com/slotota/ota/rpcjson"
)

// Whatever was recorded, on whichever transport, over all that this package has
// itself.
func TestReplay(t *testing.T) {
	for _, tr := range []replay.Transport{
		{Name: "HTTP", Closes: true, Serve: func(t *testing.T, srv *rpcjson.Server) func() (replay.Conn, error) {
			web := httptest.NewServer(srv)
			t.Cleanup(web.Close)
			return func() (replay.Conn, error) { return &posts{web: web}, nil }
		}},
		{Name: "TCP", Lines: true, Serve: replayListener(listenTCP, replay.Stream{Before: "\n\"\"\"", After: "\"\"\"\n"})},
		{Name: "Unix socket", Lines: true, Serve: replayListener(listenUnix, replay.Stream{After: "\n"})},
		{Name: "UDP", Serve: replayUDP},
		{Name: "standard input and output", Lines: true, Serve: replayStream(nil, replay.Stream{After: "\n"}, func(t *testing.T) (mine, theirs io.ReadWriteCloser) {
			a, b, err := os.Pipe()
			require.NoError(t, err)
			c, d, err := os.Pipe()
			require.NoError(t, err)
			return twoFiles{a, d}, twoFiles{c, b}
		})},
		{Name: "serial", Lines: true, Virtual: true, Serve: replayStream(rpcjson.SerialStream(), replay.Stream{Before: "\n\"\"\"", After: "\"\"\"\n", CRC: checksum}, func(*testing.T) (mine, theirs io.ReadWriteCloser) {
			return net.Pipe()
		})},
		{Name: "GATT", Virtual: true, Serve: func(t *testing.T, srv *rpcjson.Server) func() (replay.Conn, error) {
			return func() (replay.Conn, error) {
				replies := make(chan []byte, 10)
				g := srv.NewGATTServer(t.Context(), rpcjson.Peer{}, func(v []byte) { replies <- v })
				t.Cleanup(func() { require.NoError(t, g.Close()) })
				return radioLink{g, replies}, nil
			}
		}},
	} {
		replay.Run(t, "testdata", tr)
	}
}

// checksum is that of a frame on a serial line.
func checksum(frame []byte) string { return fmt.Sprintf("%08x", crc32.ChecksumIEEE(frame)) }

// posts is a channel whose frames are posted.
type posts struct {
	web *httptest.Server
	got []*http.Response
}

func (p *posts) Send(frame []byte) error {
	res, err := p.web.Client().Post(p.web.URL+"/rpc", "application/json", bytes.NewReader(append(frame, '\n')))
	if err == nil && res.StatusCode == http.StatusNoContent {
		return res.Body.Close()
	}
	p.got = append(p.got, res)
	return err
}

func (p *posts) Recv() ([]byte, error) {
	res := p.got[0]
	p.got = p.got[1:]
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	switch {
	case err != nil:
	case res.StatusCode == http.StatusBadRequest:
		err = replay.ErrClosed
	case res.StatusCode != http.StatusOK || !bytes.HasSuffix(b, []byte("}\r\n")):
		err = fmt.Errorf("%s: %q", res.Status, b)
	}
	return b, err
}

func replayListener(listen func(*testing.T) net.Listener, s replay.Stream) func(*testing.T, *rpcjson.Server) func() (replay.Conn, error) {
	return func(t *testing.T, srv *rpcjson.Server) func() (replay.Conn, error) {
		l := listen(t)
		background(t, func(ctx context.Context) error { return srv.ServeListener(ctx, l, nil) })
		return func() (replay.Conn, error) {
			c, err := net.Dial(l.Addr().Network(), l.Addr().String())
			if err != nil {
				return nil, err
			}
			t.Cleanup(func() { c.Close() })
			s := s
			s.RW = c
			return &s, c.SetDeadline(time.Now().Add(replay.Timeout))
		}
	}
}

func replayStream(o *rpcjson.StreamOptions, s replay.Stream, connect func(*testing.T) (mine, theirs io.ReadWriteCloser)) func(*testing.T, *rpcjson.Server) func() (replay.Conn, error) {
	return func(t *testing.T, srv *rpcjson.Server) func() (replay.Conn, error) {
		return func() (replay.Conn, error) {
			mine, theirs := connect(t)
			t.Cleanup(func() { mine.Close() })
			background(t, func(ctx context.Context) error { return srv.ServeStream(ctx, theirs, rpcjson.Peer{}, o) })
			s := s
			s.RW = mine
			return &s, nil
		}
	}
}

// datagrams is a socket that sends one frame in each datagram.
type datagrams struct{ net.Conn }

func (d datagrams) Send(frame []byte) error {
	_, err := d.Write(frame)
	return err
}

func (d datagrams) Recv() ([]byte, error) {
	b := make([]byte, 1<<16)
	n, err := d.Read(b)
	return b[:n], err
}

func replayUDP(t *testing.T, srv *rpcjson.Server) func() (replay.Conn, error) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	background(t, func(ctx context.Context) error { return srv.ServePacket(ctx, pc, nil) })
	return func() (replay.Conn, error) {
		c, err := net.Dial("udp", pc.LocalAddr().String())
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { c.Close() })
		return datagrams{c}, c.SetDeadline(time.Now().Add(replay.Timeout))
	}
}

// radioLink is a central that writes 20 bytes at a time.
type radioLink struct {
	g       *rpcjson.GATTServer
	replies chan []byte // notifications
}

func (r radioLink) Send(frame []byte) error {
	err := r.g.Write(rpcjson.GATTTxCtl, binary.BigEndian.AppendUint32(nil, uint32(len(frame))))
	for len(frame) > 0 && err == nil {
		n := min(20, len(frame))
		err = r.g.Write(rpcjson.GATTData, frame[:n])
		frame = frame[n:]
	}
	synctest.Wait() // one frame at a time
	return err
}

func (r radioLink) Recv() (b []byte, err error) {
	for n := binary.BigEndian.Uint32(<-r.replies); len(b) < int(n) && err == nil; {
		var p []byte
		p, err = r.g.Read(rpcjson.GATTData, 20)
		b = append(b, p...)
	}
	return b, err
}
