// Package replay tests a transport of package rpcjson with everything that was
// recorded of the genuine client, whichever transport it was recorded on, and with
// the frames and arguments that are known to be understood by genuine devices:
// what is in testdata of package rpcjson.
package replay

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/rpcjson"
)

// DeviceID is that of the device in the recordings.
const DeviceID = "esp32_123456"

// Timeout bounds every wait for a reply.
const Timeout = time.Minute

// ErrClosed is what Recv returns if the device has closed the channel, or answered
// with the HTTP status 400.
var ErrClosed = errors.New("closed")

// Conn is the client's end of a channel.
type Conn interface {
	// Send sends the text of a frame.
	Send(frame []byte) error
	// Recv returns the next reply.
	Recv() ([]byte, error)
}

// Transport is what is tested. The zero values of its flags are those of a line that
// stays open whatever comes.
type Transport struct {
	Name string
	// Serve starts to serve srv until t ends, and returns what opens a channel.
	Serve func(t *testing.T, srv *rpcjson.Server) (open func() (Conn, error))
	// Closes says that a frame that is not understood ends the channel
	// (mongoose-os-libs/rpc-common, src/mg_rpc.c: channels that are not persistent).
	Closes bool
	// NeedsSrc says that only what has a src can be answered.
	NeedsSrc bool
	// Lines says that what is no whole object is taken for text between frames.
	Lines bool
	// Virtual runs in a bubble of testing/synctest.
	Virtual bool
}

// Run tests tr with the recordings in the directory testdata of package rpcjson.
func Run(t *testing.T, testdata string, tr Transport) {
	sub := func(name string, f func(*testing.T)) {
		t.Run(tr.Name+"/"+name, func(t *testing.T) {
			if tr.Virtual {
				synctest.Test(t, f)
			} else {
				f(t)
			}
		})
	}
	r := &run{tr: &tr, dir: testdata}
	sub("frames", r.frames)
	sub("reboot", r.reboot)
	sub("arguments", r.arguments)
	for _, c := range r.recordings(t) {
		sub(c.name, func(t *testing.T) { r.recording(t, &c) })
	}
}

type run struct {
	tr  *Transport
	dir string
}

func (r *run) read(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(r.dir, name))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, v))
}

// rig is a device, and a channel to it.
type rig struct {
	t     *testing.T
	srv   *rpcjson.Server
	slots []ota.Slot
	open  func() (Conn, error)
	conn  Conn
	probe int64
}

func (r *run) rig(t *testing.T) *rig {
	g := &rig{t: t}
	for range 2 {
		var s ota.Slot
		for _, name := range []string{"app", "fs", "nvs"} {
			s.Parts = append(s.Parts, ota.Part{Name: name, Flash: memflash.New(memflash.Config{Size: 16 << 10, EraseSize: 4096})})
		}
		g.slots = append(g.slots, s)
	}
	places, err := bootrecord.Split(memflash.New(memflash.Config{Size: 12 << 10, EraseSize: 4096}), 3)
	require.NoError(t, err)
	rec, err := bootrecord.New(places, &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	require.NoError(t, err)
	require.NoError(t, rec.Store(t.Context(), ota.BootState{Committed: true, Revert: ota.NoSlot}))
	dev, err := ota.Open(t.Context(), rec, g.slots, &ota.Options{Platform: "esp32", Reset: func(context.Context) error { return nil }})
	require.NoError(t, err)
	policy := &bundle.Policy{AllowUnsigned: true, AllowSHA1: true}
	g.srv, err = rpcjson.New(dev, rpcjson.Options{
		ID: DeviceID, NoAuth: true, AllowOrigins: []string{"https://api.cesanta.com/"}, Open: policy.Image,
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, g.srv.Close()) })
	g.answer("Probe", json.RawMessage("true"))
	g.open = r.tr.Serve(t, g.srv)
	g.connect()
	return g
}

func (g *rig) connect() {
	g.t.Helper()
	var err error
	g.conn, err = g.open()
	require.NoError(g.t, err)
}

// answer makes a method give results, one after the other, the last one for ever.
func (g *rig) answer(method string, results ...any) {
	g.t.Helper()
	var mu sync.Mutex
	require.NoError(g.t, g.srv.Handle(method, "", rpcjson.Read, func(context.Context, *rpcjson.Request) (any, error) {
		mu.Lock()
		defer mu.Unlock()
		v := results[0]
		if len(results) > 1 {
			results = results[1:]
		}
		if e, ok := v.(*rpcjson.Error); ok {
			return nil, e
		}
		return v, nil
	}))
}

// ask sends a frame and returns the reply to it.
func (g *rig) ask(frame string) string {
	g.t.Helper()
	require.NoError(g.t, g.conn.Send([]byte(frame)))
	b, err := g.conn.Recv()
	require.NoError(g.t, err, "%s", frame)
	return string(bytes.TrimSpace(b))
}

// nothing asserts that nothing has come before the reply to another call.
func (g *rig) nothing(about string) {
	g.t.Helper()
	g.probe++
	require.Equal(g.t, fmt.Sprintf(`{"id":%d,"src":"`+DeviceID+`","dst":"mos","result":true}`, int64(1)<<40+g.probe),
		g.ask(fmt.Sprintf(`{"src":"mos","id":%d,"method":"Probe"}`, int64(1)<<40+g.probe)), about)
}

const bootState = `{"active_slot": 0, "is_committed": true, "revert_slot": 0, "commit_timeout": 0}`

type frameCase struct {
	Name, Request string
	Reply         *string
	Closed        string `json:"non_persistent_channel"`
}

func (r *run) frameCases(t *testing.T) []frameCase {
	var v struct{ Cases []frameCase }
	r.read(t, "frames.json", &v)
	require.Len(t, v.Cases, 27)
	return v.Cases
}

// frames sends frames that a device answers, ignores, or closes the channel after.
func (r *run) frames(t *testing.T) {
	g := r.rig(t)
	g.answer("OTA.GetBootState", json.RawMessage(bootState))
	g.answer("OTA.Commit", &rpcjson.Error{Code: -1})
	for _, c := range r.frameCases(t) {
		if c.Name == "reboot-lockout" {
			continue // see reboot
		}
		text := r.tr.Lines && !strings.HasSuffix(c.Request, "}")
		switch {
		case c.Closed != "" && r.tr.Closes:
			require.NoError(t, g.conn.Send([]byte(c.Request)))
			b, err := g.conn.Recv()
			require.ErrorIs(t, err, ErrClosed, "%s: %q", c.Name, b)
			g.connect()
		case c.Reply != nil && !text && (!r.tr.NeedsSrc || strings.Contains(c.Request, `"src"`)):
			require.Equal(t, *c.Reply, g.ask(c.Request), c.Name)
		default:
			require.NoError(t, g.conn.Send([]byte(c.Request)))
		}
		g.nothing(c.Name)
	}
}

// reboot asks shortly before the device restarts.
func (r *run) reboot(t *testing.T) {
	g := r.rig(t)
	c := r.frameCases(t)[26]
	require.Equal(t, "reboot-lockout", c.Name)
	b, err := g.srv.Call(t.Context(), rpcjson.Peer{Channel: "loopback"}, []byte(`{"id":1,"method":"Sys.Reboot","params":{"delay_ms":80}}`))
	require.NoError(t, err)
	require.Contains(t, string(b), `"result":null`)
	left := regexp.MustCompile(`\d+ ms`) // some of the 80 may have passed
	require.Equal(t, left.ReplaceAllString(*c.Reply, "N ms"), left.ReplaceAllString(g.ask(c.Request), "N ms"))
}

// arguments sends arguments and has the device tell what it understood.
func (r *run) arguments(t *testing.T) {
	var v struct {
		Cases []struct {
			Conversion, Arg, JSON string
			Matches               int
			Int                   int64
			Bool                  bool
			String                string
			Bytes                 string `json:"bytes_b64"`
		}
	}
	r.read(t, "args.json", &v)
	require.Len(t, v.Cases, 72)
	g := r.rig(t)
	echo := func(conversion string, get func(a *rpcjson.Args, name string) (any, bool)) {
		require.NoError(t, g.srv.Handle("Arg."+conversion[1:], "", rpcjson.Read, func(_ context.Context, q *rpcjson.Request) (any, error) {
			name, _ := q.Args.String("arg_name")
			v, given := get(q.Args, name)
			return map[string]any{"value": v, "given": given}, q.Args.Err()
		}))
	}
	echo("%d", func(a *rpcjson.Args, name string) (any, bool) { return two(a.Int(name, math.MinInt32, math.MaxInt32)) })
	echo("%ld", func(a *rpcjson.Args, name string) (any, bool) { return two(a.Int(name, math.MinInt64, math.MaxInt64)) })
	echo("%B", func(a *rpcjson.Args, name string) (any, bool) { return two(a.Bool(name)) })
	echo("%Q", func(a *rpcjson.Args, name string) (any, bool) { return two(a.String(name)) })
	echo("%T", func(a *rpcjson.Args, name string) (any, bool) { raw, _, ok := a.Token(name); return string(raw), ok })
	echo("%V", func(a *rpcjson.Args, name string) (any, bool) {
		b, ok := a.Bytes(name)
		return base64.StdEncoding.EncodeToString(b), ok
	})
	refused, nulls, absent := 0, 0, 0
	for i, c := range v.Cases {
		// The name of the argument goes with them.
		params, isObject := strings.CutPrefix(strings.TrimSpace(c.JSON), "{")
		if !isObject {
			absent++ // no object, no arguments
			continue
		}
		frame := fmt.Sprintf(`{"src":"mos","id":%d,"method":"Arg.%s","params":{"arg_name":"%s",%s}`, i+1, c.Conversion[1:], c.Arg, params)
		name := c.Conversion + " " + c.JSON
		reply := g.ask(frame)
		want, err := g.srv.Call(t.Context(), rpcjson.Peer{Channel: "loopback"}, []byte(frame))
		require.NoError(t, err)
		require.Equal(t, string(want), reply, "%s: not as without a transport", name)
		var got struct {
			ID     int
			Error  *rpcjson.Error
			Result struct {
				Given bool
				Value any
			}
		}
		require.NoError(t, json.Unmarshal([]byte(reply), &got))
		require.Equal(t, i+1, got.ID)
		switch {
		case got.Error != nil: // stricter than the original
			require.Equal(t, 400, got.Error.Code, name)
			require.Contains(t, got.Error.Message, c.Arg, name)
			refused++
		case c.Matches == 1 && !got.Result.Given:
			require.Contains(t, c.JSON, "null", name)
			nulls++
		case c.Matches == 0:
			require.False(t, got.Result.Given, name)
		default:
			require.True(t, got.Result.Given, name)
			want := map[string]any{"%d": float64(c.Int), "%ld": float64(c.Int), "%B": c.Bool, "%Q": c.String, "%T": c.String, "%V": c.Bytes}[c.Conversion]
			require.Equal(t, want, got.Result.Value, name)
		}
	}
	// As TestArgVectors of package rpcjson lists them.
	require.Equal(t, [3]int{17, 2, 3}, [3]int{refused, nulls, absent})
}

func two[T any](v T, ok bool) (any, bool) { return v, ok }

// recorded is what a client sent one after the other, and the replies that it got.
type recorded struct {
	name  string
	calls []call
}

type call struct{ method, request, reply string }

// recordings returns all that consists of frames.
func (r *run) recordings(t *testing.T) (all []recorded) {
	type part struct {
		Dir, Type, RPC      string
		Data, JSON, Payload string
		Request             string
		RequestBody         string `json:"request_body"`
		ResponseBody        string `json:"response_body"`
	}
	for _, f := range []struct {
		file  string
		cases int
	}{{"http.json", 30}, {"websocket.json", 5}, {"serial.json", 5}, {"tcp.json", 2}, {"udp.json", 3}, {"mqtt.json", 3}} {
		var v struct {
			Cases []struct {
				Name                                  string
				Exchanges, Frames, Datagrams, Packets []part
			}
		}
		r.read(t, f.file, &v)
		require.Len(t, v.Cases, f.cases)
		for _, c := range v.Cases {
			if strings.HasPrefix(c.Name, "rest/") {
				continue // no frames
			}
			rec := recorded{name: strings.TrimSuffix(f.file, ".json") + "/" + c.Name}
			for _, x := range c.Exchanges {
				rec.calls = append(rec.calls, call{x.RPC, x.RequestBody, x.ResponseBody})
			}
			for _, p := range slices.Concat(c.Frames, c.Datagrams, c.Packets) {
				text := p.Data + p.JSON + p.Payload
				switch {
				case !strings.HasPrefix(text, "{"):
				case p.RPC != "":
					rec.calls = append(rec.calls, call{method: p.RPC, request: text})
				default:
					// Replies came in the order of the calls, except for those that got lost.
					id := regexp.MustCompile(`"id":\d+`).FindString(text)
					i := slices.IndexFunc(rec.calls, func(c call) bool { return strings.Contains(c.request, id+",") })
					require.GreaterOrEqual(t, i, 0, "%s: reply to nothing", rec.name)
					rec.calls[i].reply = text
				}
			}
			require.NotEmpty(t, rec.calls, rec.name)
			all = append(all, rec)
		}
	}
	require.Len(t, all, 37)
	return all
}

// recording sends what a client sent, in its order. A push goes into a device;
// elsewhere the device gives the results that were recorded.
func (r *run) recording(t *testing.T, c *recorded) {
	_, name, _ := strings.Cut(c.name, "/")
	live := strings.HasPrefix(name, "ota/full") || name == "ota/own-begin-args" || name == "ota/lost-write-reply"
	g := r.rig(t)
	if !live {
		results := map[string][]any{}
		for _, x := range c.calls {
			var reply struct {
				Result json.RawMessage
				Error  *rpcjson.Error
			}
			require.NoError(t, json.Unmarshal([]byte(x.reply), &reply))
			switch {
			case reply.Error != nil && reply.Error.Code == 404:
				continue
			case reply.Error != nil:
				results[x.method] = append(results[x.method], reply.Error)
			default:
				results[x.method] = append(results[x.method], reply.Result)
			}
		}
		for method, v := range results {
			g.answer(method, v...)
		}
	}
	for _, x := range c.calls {
		got, want := g.ask(strings.TrimSuffix(x.request, "\n")), strings.TrimSpace(x.reply)
		if live && x.method == "OTA.End" {
			// The rest are placeholders in the recording.
			const text = `"state": 3, "message": "Update applied, rebooting"`
			require.Contains(t, got, text)
			got, _, _ = strings.Cut(got, text)
			want, _, _ = strings.Cut(want, text)
		}
		if want == "" { // got lost
			require.Contains(t, got, `"result":null}`)
			continue
		}
		require.Equal(t, want, got)
	}
	g.nothing("at the end")
	if live && c.calls[len(c.calls)-1].method == "OTA.End" {
		fs := make([]byte, 14)
		_, err := g.slots[1].Parts[1].Flash.ReadAt(fs, 0)
		require.NoError(t, err)
		require.Equal(t, "hello fs image", string(fs))
	}
}

// Stream is a Conn over a byte stream. It sends frames between Before and After.
type Stream struct {
	RW            io.ReadWriter
	Before, After string
	// CRC adds the checksum of a frame and demands that of its reply.
	CRC func(frame []byte) string

	buf []byte
}

// Send implements Conn.
func (s *Stream) Send(frame []byte) error {
	b := append([]byte(s.Before), frame...)
	if s.CRC != nil {
		b = append(b, s.CRC(frame)...)
	}
	_, err := s.RW.Write(append(b, s.After...))
	return err
}

// Recv implements Conn.
func (s *Stream) Recv() ([]byte, error) {
	for {
		line, rest, ok := bytes.Cut(s.buf, []byte("\n"))
		if !ok {
			b := make([]byte, 4096)
			n, err := s.RW.Read(b)
			if err != nil {
				return nil, errors.Join(ErrClosed, err)
			}
			s.buf = append(s.buf, b[:n]...)
			continue
		}
		s.buf = bytes.Clone(rest)
		line = bytes.Trim(line, "\"\r\x11\x13")
		end := bytes.LastIndexByte(line, '}') + 1
		if end == 0 {
			continue
		}
		if s.CRC != nil && string(line[end:]) != s.CRC(line[:end]) {
			return nil, fmt.Errorf("wrong checksum: %q", line)
		}
		return line[:end], nil
	}
}
