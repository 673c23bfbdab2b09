package rpcjson_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/fetch"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/rpcjson"
)

// board is a device with two slots in memory, whose parts are those of
// testdata/small.zip, and its server.
type board struct {
	t      *testing.T
	slots  []ota.Slot
	boot   ota.Bootloader
	dev    *ota.Device
	srv    *rpcjson.Server
	resets chan struct{}
}

func newBoard(t *testing.T) *board { return newBoardFor(t, nil) }

// newBoardFor returns a board that asks auth who may call; nil lets everybody.
func newBoardFor(t *testing.T, auth rpcjson.Authorizer) *board {
	b := &board{t: t, resets: make(chan struct{}, 1)}
	for range 2 {
		var s ota.Slot
		for _, name := range []string{"app", "fs", "nvs"} {
			s.Parts = append(s.Parts, ota.Part{Name: name, Flash: memflash.New(memflash.Config{Size: 256 << 10, EraseSize: 4096})})
		}
		b.slots = append(b.slots, s)
	}
	_, err := b.slots[0].Parts[0].Flash.WriteAt([]byte("the factory firmware"), 0)
	require.NoError(t, err)
	places, err := bootrecord.Split(memflash.New(memflash.Config{Size: 64 << 10, EraseSize: 4096}), 3)
	require.NoError(t, err)
	running := ota.SlotID(0)
	rec, err := bootrecord.New(places, &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return running, nil }})
	require.NoError(t, err)
	require.NoError(t, rec.Store(t.Context(), ota.BootState{Committed: true, Revert: ota.NoSlot}))
	b.boot = rec
	b.dev, err = ota.Open(t.Context(), rec, b.slots, &ota.Options{
		Platform: "esp32",
		Reset:    func(context.Context) error { b.resets <- struct{}{}; return nil },
	})
	require.NoError(t, err)
	policy := &bundle.Policy{AllowUnsigned: true, AllowSHA1: true}
	b.srv, err = rpcjson.New(b.dev, rpcjson.Options{
		ID: "esp32_123456", Authorizer: auth, NoAuth: auth == nil, Fetch: &fetch.Policy{AllowHTTP: true, AllowLoopback: true},
		Open: func(ctx context.Context, r io.Reader) (ota.Image, error) { return policy.Image(ctx, r) },
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.srv.Close()) })
	return b
}

// call returns the result or error object.
func (b *board) call(method, params string) string {
	b.t.Helper()
	if params == "" {
		params = "null"
	}
	reply, err := b.srv.Call(b.t.Context(), rpcjson.Peer{Channel: "loopback", User: "test"}, []byte(`{"id":1,"method":"`+method+`","params":`+params+`}`))
	require.NoError(b.t, err)
	rest, ok := strings.CutPrefix(string(reply), `{"id":1,"src":"esp32_123456",`)
	require.True(b.t, ok, "%s", reply)
	return strings.TrimSuffix(rest, "}")
}

// untouched requires that slot 0 runs on and nothing else can.
func (b *board) untouched() {
	b.t.Helper()
	require.Equal(b.t, `"result":{"active_slot": 0, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`, b.call("OTA.GetBootState", ""))
	s, err := b.boot.Load(b.t.Context())
	require.NoError(b.t, err)
	require.Equal(b.t, ota.SlotID(0), s.Active)
	require.True(b.t, s.Committed)
	got := make([]byte, 20)
	_, err = b.slots[0].Parts[0].Flash.ReadAt(got, 0)
	require.NoError(b.t, err)
	require.Equal(b.t, "the factory firmware", string(got))
	require.Empty(b.t, b.dev.Status().Busy)
}

func chunk(zip []byte, off, end int) string {
	return fmt.Sprintf(`{"offset":%d,"data":"%s"}`, off, base64.StdEncoding.EncodeToString(zip[off:end]))
}

func smallZip(t *testing.T) []byte {
	zip, err := os.ReadFile("testdata/small.zip")
	require.NoError(t, err)
	require.Len(t, zip, 2558)
	return zip
}

// A whole update as mos sends it, byte by byte from its recording, into a real
// device; then commit and revert are refused until the reboot, and the device
// has been reset.
func TestDevicePush(t *testing.T) {
	b := newBoard(t)
	web := httptest.NewServer(b.srv)
	defer web.Close()
	raw, err := os.ReadFile("testdata/http.json")
	require.NoError(t, err)
	var v struct {
		Cases []struct {
			Name      string
			Exchanges []struct {
				Body string `json:"request_body"`
			}
		}
	}
	require.NoError(t, json.Unmarshal(raw, &v))
	var last string
	for _, c := range v.Cases {
		if c.Name != "ota/full" {
			continue
		}
		for _, x := range c.Exchanges {
			res, err := http.Post(web.URL+"/rpc", "application/json", strings.NewReader(x.Body))
			require.NoError(t, err)
			body, err := io.ReadAll(res.Body)
			require.NoError(t, err)
			require.NoError(t, res.Body.Close())
			last = string(body)
			require.NotContains(t, last, `"error"`)
		}
	}
	require.Contains(t, last, `"result":{"state": 3, "message": "Update applied, rebooting", "is_committed": false, "progress_percent": 100, "commit_timeout": 300, "partition": 1}}`)
	require.Equal(t, `"result":{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 300}`, b.call("OTA.GetBootState", ""))
	fs := make([]byte, 14)
	_, err = b.slots[1].Parts[1].Flash.ReadAt(fs, 0)
	require.NoError(t, err)
	require.Equal(t, "hello fs image", string(fs))
	<-b.resets
	s, err := b.boot.Load(t.Context())
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(1), s.Active)
	require.False(t, s.Committed)
}

func TestDevicePull(t *testing.T) {
	zip := smallZip(t)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/fw.zip":
			_, _ = w.Write(zip)
		case "/broken.zip":
			bad := bytes.Clone(zip)
			bad[1000] ^= 1
			_, _ = w.Write(bad)
		case "/short.zip":
			_, _ = w.Write(zip[:2000])
		default:
			_, _ = io.WriteString(w, "<html>not a bundle</html>")
		}
	}))
	defer web.Close()
	b := newBoard(t)
	for _, path := range []string{"/broken.zip", "/short.zip", "/index.html"} {
		got := b.call("OTA.Update", `{"url":"`+web.URL+path+`","commit_timeout":300}`)
		require.Contains(t, got, `"error":{"code":-1,"message":"`, path)
		require.NotContains(t, got, "<html>")
		require.Contains(t, b.call("OTA.Status", ""), `"result":{"state": 2, "message": "`)
		b.untouched()
	}
	require.Equal(t, `"result":true`, b.call("OTA.Update", `{"url":"`+web.URL+`/fw.zip","commit_timeout":300}`))
	require.Equal(t, `"result":{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 300}`, b.call("OTA.GetBootState", ""))
	<-b.resets
}

// Whatever comes in, the running slot, the boot state and the way back stay.
func TestDeviceBadInput(t *testing.T) {
	zip := smallZip(t)
	b := newBoard(t)
	for _, c := range [][3]string{
		{"OTA.Commit", "", `"error":{"code":-1}`},
		{"OTA.Revert", "", `"error":{"code":-1}`},
		{"OTA.SetBootState", `{"active_slot":7}`, `"error":{"code":-3,"message":"`},
		{"OTA.SetBootState", `{"active_slot":-1}`, `"error":{"code":-3,"message":"`},
		{"OTA.SetBootState", `{"active_slot":1}`, `"error":{"code":-3,"message":"`},
		{"OTA.SetBootState", `{"revert_slot":7}`, `"error":{"code":-3,"message":"`},
		{"OTA.SetBootState", `{"revert_slot":1,"is_committed":false}`, `"error":{"code":-3,"message":"`},
		{"OTA.SetBootState", `{}`, `"error":{"code":-2,"message":"`},
		{"OTA.Write", chunk(zip, 0, 10), `"error":{"code":-1,"message":"Update not started"}`},
		{"OTA.End", "", `"error":{"code":-1,"message":"Update not started"}`},
		// Cut off, then damaged.
		{"OTA.Begin", "", `"result":null`},
		{"OTA.Write", chunk(zip, 0, 2000), `"result":null`},
		{"OTA.End", "", `Unexpected end of data"}`},
		{"OTA.Begin", "", `"result":null`},
		{"OTA.Write", chunk([]byte("garbage, and more of it than one header needs"), 0, 45), `"error":{"code":-1,"message":"-1 `},
		{"OTA.Write", chunk(zip, 0, 512), `"error":{"code":-1,"message":"-1 `},
		{"OTA.End", "", `"error":{"code":-1,"message":"-1 `},
		// A chunk left out.
		{"OTA.Begin", "", `"result":null`},
		{"OTA.Write", chunk(zip, 0, 512), `"result":null`},
		{"OTA.Write", chunk(zip, 1024, 1536), `"error":{"code":-1,"message":"Expected offset 512, got 1024"}`},
		{"OTA.End", "", `Unexpected end of data"}`},
	} {
		require.Contains(t, b.call(c[0], c[1]), c[2], "%s %s", c[0], c[1])
		if c[0] != "OTA.Begin" && !strings.HasPrefix(c[2], `"result"`) && !strings.HasPrefix(c[2], `"error":{"code":-1,"message":"Expected`) {
			b.untouched()
		}
	}
	select {
	case <-b.resets:
		t.Fatal("the device was reset")
	default:
	}
}

func BenchmarkWrite(b *testing.B) {
	srv, err := rpcjson.New(new(ota.Device), rpcjson.Options{ID: "d", NoAuth: true})
	require.NoError(b, err)
	data := base64.StdEncoding.EncodeToString(make([]byte, 90<<10))
	frame := []byte(`{"id":1,"method":"OTA.Write","params":{"offset":0,"data":"` + data + `"}}`)
	require.NoError(b, srv.Handle("OTA.Write", "", rpcjson.Install, func(_ context.Context, r *rpcjson.Request) (any, error) {
		r.Args.Bytes("data")
		r.Args.Int("offset", 0, 1)
		return nil, r.Args.Err()
	}))
	b.SetBytes(90 << 10)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := srv.Call(b.Context(), rpcjson.Peer{}, frame); err != nil {
			b.Fatal(err)
		}
	}
	require.NoError(b, srv.Close())
}
