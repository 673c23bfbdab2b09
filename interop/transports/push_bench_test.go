//go:build unix

package transports_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/mongoose-os/mos/common/fwbundle"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/ws"
)

// benchSize is the size of the part that benchmarks push.
const benchSize = 8 << 20

// bigBundle returns a bundle of that size.
func bigBundle(b testing.TB) []byte {
	b.Helper()
	fw := fwbundle.NewBundle()
	fw.Name, fw.Platform, fw.Version, fw.BuildID = "demo", "esp32", "2.0", "20260202-000000/next"
	for spec, n := range map[string]int{
		"app:type=app,src=app.bin,ptn=app_0":          benchSize,
		"fs:type=fs,src=fs.img,fs_size=4096,ptn=fs_0": 4096,
		"nvs:type=nvs,size=4096,fill=255,ptn=nvs":     0,
	} {
		_, p, err := fwbundle.PartFromString(spec)
		require.NoError(b, err)
		if n > 0 {
			data := make([]byte, n)
			_, _ = rand.Read(data)
			p.SetData(data)
		}
		require.NoError(b, fw.AddPart(p))
	}
	var buf bytes.Buffer
	require.NoError(b, fwbundle.WriteSignedZipFirmwareBytes(fw, &buf, false, nil, nil))
	return buf.Bytes()
}

// BenchmarkPush pushes 8 MiB over loopback, in turn as a plain HTTP body and with our
// client in chunks of 64 KiB over HTTP and over WebSocket; and 256 KiB of it with the
// genuine client, in its chunks of 512 bytes. The sink is the same for all: a device
// that verifies and installs, on memory that costs no time, or one that throws all
// away. Reported are rates in MB/s, and the medians over the rounds of their ratios
// to that of the plain body in the same round; with -cpu in the name, the same by
// the processor time of both sides, which other load disturbs less:
//
//	go test -run '^$' -bench Push -benchtime 20x ./transports
func BenchmarkPush(b *testing.B) {
	zip := bigBundle(b)
	b.Run("install", func(b *testing.B) { benchmarkPush(b, zip, true) })
	b.Run("discard", func(b *testing.B) { benchmarkPush(b, zip, false) })
}

func benchmarkPush(b *testing.B, zip []byte, install bool) {
	small := zip[:256<<10]
	smallFile := filepath.Join(b.TempDir(), "part.zip")
	require.NoError(b, os.WriteFile(smallFile, small, 0o600))
	errSink := errors.New("a sink")
	// run measures one push into a new device.
	run := func(push func(b *testing.B, host string)) cost {
		d := newDeviceOf(b, benchSize+8192, func(o *rpcjson.Options) {
			if !install {
				o.Open = func(_ context.Context, r io.Reader) (ota.Image, error) {
					_, err := io.Copy(io.Discard, r)
					return nil, errors.Join(err, errSink)
				}
			}
		})
		h := ws.NewHandler(d.srv, nil)
		mux := http.NewServeMux()
		mux.Handle("/rpc", h)
		mux.HandleFunc("/plain", func(w http.ResponseWriter, r *http.Request) {
			if !install {
				_, _ = io.Copy(io.Discard, r.Body)
				return
			}
			img, err := policy.Image(r.Context(), r.Body)
			if err == nil {
				_, err = d.dev.Update(r.Context(), img, nil)
			}
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
			}
		})
		web := httptest.NewServer(mux)
		before := spent(b)
		push(b, web.Listener.Addr().String())
		took := spent(b)
		took.wall, took.cpu = took.wall-before.wall, took.cpu-before.cpu
		require.NoError(b, d.srv.Close())
		require.NoError(b, h.Close())
		web.Close()
		return took
	}
	// ours pushes with our client. The end of what goes to nowhere is refused.
	ours := func(b *testing.B, c *rpcjson.Client) {
		defer c.Close()
		err := c.Push(b.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{ChunkSize: 64 << 10})
		if install {
			require.NoError(b, err)
		} else {
			require.ErrorContains(b, err, errSink.Error())
		}
	}
	pushes := []struct {
		name string
		size int
		push func(b *testing.B, host string)
	}{
		{"plain", len(zip), func(b *testing.B, host string) {
			res, err := http.Post("http://"+host+"/plain", "application/octet-stream", bytes.NewReader(zip))
			require.NoError(b, err)
			require.Equal(b, 200, res.StatusCode)
			require.NoError(b, res.Body.Close())
		}},
		{"http", len(zip), func(b *testing.B, host string) {
			c, err := rpcjson.Dial(b.Context(), "http://"+host+"/rpc", nil)
			require.NoError(b, err)
			ours(b, c)
		}},
		{"ws", len(zip), func(b *testing.B, host string) {
			ch, err := ws.Dial(b.Context(), "ws://"+host+"/rpc", nil)
			require.NoError(b, err)
			ours(b, rpcjson.NewClient(ch, nil))
		}},
		{"mos-http", len(small), func(b *testing.B, host string) {
			require.Error(b, genuinePush(b, genuine(b, "http://"+host+"/rpc", deadline), smallFile, 512))
		}},
		{"mos-ws", len(small), func(b *testing.B, host string) {
			require.Error(b, genuinePush(b, genuine(b, "ws://"+host+"/rpc", deadline), smallFile, 512))
		}},
	}
	took := make([][]cost, len(pushes)) // by round
	for b.Loop() {
		for i, p := range pushes {
			took[i] = append(took[i], run(p.push))
		}
	}
	median := func(value func(round int) float64) float64 {
		v := make([]float64, len(took[0]))
		for round := range v {
			v[round] = value(round)
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	for i, p := range pushes {
		b.ReportMetric(median(func(round int) float64 { return float64(p.size) / 1e6 / took[i][round].wall.Seconds() }), p.name+"-MB/s")
	}
	for _, i := range []int{1, 2} {
		name := pushes[i].name + "/plain"
		b.ReportMetric(median(func(round int) float64 { return float64(took[0][round].wall) / float64(took[i][round].wall) }), name)
		b.ReportMetric(median(func(round int) float64 { return float64(took[0][round].cpu) / float64(took[i][round].cpu) }), name+"-cpu")
	}
	b.ReportMetric(0, "ns/op")
}

// cost is what a push takes.
type cost struct{ wall, cpu time.Duration }

// spent returns the time, and the processor time of this process.
func spent(b *testing.B) cost {
	var u syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return cost{time.Duration(time.Now().UnixNano()), time.Duration(u.Utime.Nano() + u.Stime.Nano())}
}
