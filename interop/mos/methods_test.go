package mos_test

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/mongoose-os/mos/cli/dev"
	"github.com/mongoose-os/mos/common/mgrpc"
	"github.com/mongoose-os/mos/common/mgrpc/frame"
	"github.com/stretchr/testify/require"
)

// What the client asks before an update, and what it prints for mistakes.
func TestMethods(t *testing.T) {
	d := newRig(t, rigOptions{})

	var list []string
	require.NoError(t, json.Unmarshal([]byte(d.must("RPC.List", "")), &list))
	require.Subset(t, list, []string{
		"OTA.Update", "OTA.Commit", "OTA.Revert", "OTA.CreateSnapshot", "OTA.GetBootState", "OTA.SetBootState",
		"OTA.Begin", "OTA.Write", "OTA.End", "OTA.Status",
		"RPC.List", "RPC.Describe", "RPC.Ping", "Sys.GetInfo", "Sys.GetUID", "Sys.Reboot",
	})
	require.Equal(t, `{"name": "OTA.Begin", "args_fmt": "{timeout: %d, commit_timeout: %d, size: %d}"}`,
		d.must("RPC.Describe", `{"name":"OTA.Begin"}`))
	require.Contains(t, d.must("RPC.Ping", ""), `{"channel_info": "127.0.0.1:`)

	info, err := dev.GetInfo(t.Context(), d.connect())
	require.NoError(t, err)
	require.Equal(t, "demo", *info.App)
	require.Equal(t, "esp32", *info.Arch)
	require.Equal(t, "1.0", *info.Fw_version)
	require.Equal(t, "20250101-000000/factory", *info.Fw_id)
	require.Equal(t, "240AC4123456", *info.Mac)
	require.Contains(t, d.must("Sys.GetUID", ""), `"app": "demo"`)

	require.Equal(t, committed0, d.must("OTA.GetBootState", ""))
	require.Equal(t, `{"state": 0, "message": "idle", "is_committed": true, "progress_percent": 0, "commit_timeout": 0, "partition": 0}`,
		d.must("OTA.Status", ""))
	require.Equal(t, committed0, d.must("ota.getbootstate", ""), "method names in any case")

	// As `mos call` prints them.
	d.refused("No.Such", "", "remote error 404: No handler for No.Such")
	d.refused("RPC.Describe", "", "remote error 400: name is required")
	d.refused("RPC.Describe", `{"name":"x"}`, "remote error 404: name not found")
	d.refused("OTA.Commit", "", "remote error -1: ")
	d.refused("OTA.Revert", "", "remote error -1: ")
	d.refused("OTA.Write", `{"offset":0,"data":"aGVsbG8="}`, "remote error -1: Update not started")
	d.refused("OTA.End", "", "remote error -1: Update not started")
	d.refused("OTA.Update", "", "remote error -1: either file or url is required")
	d.refused("Sys.Reboot", `{"delay_ms":-1}`, "remote error 400: invalid delay value")
	for _, c := range []struct{ params, code string }{
		{``, "-2"},
		{`{}`, "-2"},
		{`{"active_slot":2}`, "-3"},
		{`{"active_slot":-1}`, "-3"},
		{`{"active_slot":1}`, "-3"}, // never verified
		{`{"revert_slot":0}`, "-3"},
		{`{"revert_slot":1}`, "-3"},
		{`{"is_committed":false}`, "-3"},
		{`{"is_committed":"true"}`, "400"},
		{`{"commit_timeout":60}`, "-3"},
	} {
		_, err := d.call("OTA.SetBootState", c.params)
		require.ErrorContains(t, err, "remote error "+c.code+": ", c.params)
		require.Greater(t, len(err.Error()), len("remote error "+c.code+": "), "a message: %s", c.params)
	}
	require.Equal(t, committed0, d.must("OTA.GetBootState", ""))
	require.Equal(t, 1, d.bootCount())
}

// Old firmware knows the arguments by the name args; the client has a flag for it.
func TestCompatArgs(t *testing.T) {
	d := newRig(t, rigOptions{})
	rpc, err := mgrpc.New(t.Context(), d.url(), mgrpc.LocalID("mos"), mgrpc.CompatArgs(true))
	require.NoError(t, err)
	defer rpc.Disconnect(t.Context())
	res, err := rpc.Call(t.Context(), "", &frame.Command{Cmd: "RPC.Describe", Args: []byte(`{"name":"OTA.Commit"}`)}, nil)
	require.NoError(t, err)
	require.Zero(t, res.Status, res.StatusMsg)
	require.Equal(t, `{"name": "OTA.Commit", "args_fmt": ""}`, string(res.Response))
	require.JSONEq(t, `{"name":"OTA.Commit"}`, string(d.requests()[0].DeprecatedArgs))
}

func TestSnapshot(t *testing.T) {
	d := newRig(t, rigOptions{})
	require.Equal(t, `{"slot": 1}`, d.must("OTA.CreateSnapshot", ""))
	require.Equal(t, d.part(0, 0, appSize), d.part(1, 0, appSize))
	require.Equal(t, d.part(0, 1, fsSize), d.part(1, 1, fsSize))
	require.Equal(t, committed0, d.must("OTA.GetBootState", ""), "a snapshot alone changes nothing")

	// The snapshot is verified firmware now: select it by hand, as the
	// documentation of the original tells.
	require.Equal(t, "null", d.must("OTA.SetBootState", `{"active_slot":1,"revert_slot":0,"is_committed":false,"commit_timeout":300}`))
	require.Equal(t, `{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 300}`, d.must("OTA.GetBootState", ""))
	require.Equal(t, "null", d.must("Sys.Reboot", `{"delay_ms":1}`))
	h := d.afterBoot(2)
	require.EqualValues(t, 1, h.Slot)
	require.True(t, h.FirstBoot)
	require.Equal(t, "null", d.must("OTA.Commit", ""))
	d.refused("OTA.Commit", "", "remote error -1: ")
	require.Equal(t, committed1, d.must("OTA.GetBootState", ""))
	require.EqualValues(t, 1, d.powerCycle().Slot)
}

// With set_as_revert, the running firmware has to prove itself again.
func TestSnapshotAsRevert(t *testing.T) {
	d := newRig(t, rigOptions{})
	require.Equal(t, `{"slot": 1}`, d.must("OTA.CreateSnapshot", `{"set_as_revert":true,"commit_timeout":"300"}`))
	require.Equal(t, `{"active_slot": 0, "is_committed": false, "revert_slot": 1, "commit_timeout": 300}`, d.must("OTA.GetBootState", ""))
	d.refused("OTA.CreateSnapshot", "", "remote error -1: Cannot create snapshots in uncommitted state")
	h := d.powerCycle()
	require.EqualValues(t, 0, h.Slot)
	require.True(t, h.FirstBoot)
	h = d.powerCycle()
	require.EqualValues(t, 1, h.Slot, "not committed: back to the snapshot")
	require.Equal(t, committed1, d.must("OTA.GetBootState", ""))
}

// The device pulls the bundle and answers when it is done.
func TestUpdateByURL(t *testing.T) {
	d := newRig(t, rigOptions{})
	asked := make(chan *http.Request, 100)
	bundles := http.FileServer(http.Dir(testdata))
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.Clone(context.Background())
		if r.URL.Path == "/same" {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		bundles.ServeHTTP(w, r)
	}))
	defer files.Close()
	update := func(name, more string) string { return `{"url":"` + files.URL + "/" + name + `"` + more + `}` }

	require.Equal(t, "true", d.must("OTA.Update", update("same?a=1&b=%3C2%3E", "")))
	first := <-asked
	require.Equal(t, "a=1&b=%3C2%3E", first.URL.RawQuery)
	header := first.Header
	require.Equal(t, "esp32_123456 240AC4123456", header.Get("X-MGOS-Device-ID"))
	require.Equal(t, "esp32 1.0 20250101-000000/factory", header.Get("X-MGOS-FW-Version"))
	require.Equal(t, "demo/1.0 (MongooseOS/2.20.0; esp32)", header.Get("User-Agent"))

	_, err := d.call("OTA.Update", update("k0.pub.pem", ""))
	require.ErrorContains(t, err, "remote error -1: ")
	_, err = d.call("OTA.Update", update("nofs.zip", ""))
	require.ErrorContains(t, err, "remote error -1: ")
	_, err = d.call("OTA.Update", update("none.zip", ""))
	require.ErrorContains(t, err, "remote error -1: Invalid HTTP response code")
	require.Equal(t, committed0, d.must("OTA.GetBootState", ""))
	require.Equal(t, 2, d.status().State, "error")
	require.Equal(t, 1, d.bootCount())

	require.Equal(t, "true", d.must("OTA.Update", update("small.zip", `,"commit_timeout":300`)))
	h := d.afterBoot(2)
	require.EqualValues(t, 1, h.Slot)
	require.True(t, h.FirstBoot)
	require.Equal(t, `{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 300}`, d.must("OTA.GetBootState", ""))
	_, err = d.call("OTA.Update", update("small.zip", ""))
	require.ErrorContains(t, err, "remote error -1: ", "uncommitted")

	require.Equal(t, "null", d.must("OTA.Revert", ""))
	h = d.afterBoot(3)
	require.EqualValues(t, 0, h.Slot)
	require.Equal(t, committed0, d.must("OTA.GetBootState", ""))
	require.Equal(t, 2, d.status().State, "the outcome survives the reboot")
	require.Contains(t, d.status().Message, "requested")

	// Once more, without a commit timeout: it commits itself.
	require.Equal(t, "true", d.must("OTA.Update", update("small.zip", "")))
	require.EqualValues(t, 1, d.afterBoot(4).Slot)
	require.Eventually(t, func() bool { return d.must("OTA.GetBootState", "") == committed1 }, deadline, poll)
	require.Contains(t, d.must("Sys.GetInfo", ""), `"fw_version": "1.2.3", "fw_id": "20260101-000000/test"`)
	require.Equal(t, "true", d.must("OTA.Update", update("small.zip", `,"ignore_same_version":true`)))
	require.Equal(t, committed1, d.must("OTA.GetBootState", ""))
	require.Equal(t, 4, d.bootCount())
}

// The bundle is a file that the device has already.
func TestUpdateByFile(t *testing.T) {
	d := newRig(t, rigOptions{})
	_, err := d.call("OTA.Update", `{"file":"none.zip"}`)
	require.ErrorContains(t, err, "remote error -1: ")
	_, err = d.call("OTA.Update", `{"file":"../doc.go"}`)
	require.ErrorContains(t, err, "remote error -1: ")
	d.refused("OTA.Update", `{"file":"small.zip","url":"http://127.0.0.1/"}`, "remote error -1: either file or url is required")
	require.Equal(t, "true", d.must("OTA.Update", `{"file":"small.zip","commit_timeout":300}`))
	require.EqualValues(t, 1, d.afterBoot(2).Slot)
	require.Equal(t, "null", d.must("OTA.Commit", ""))
}

// The client does not wait as long as an update takes. That must not harm it: the
// client is to look at the status instead.
func TestUpdateOutlivesCaller(t *testing.T) {
	d := newRig(t, rigOptions{})
	small, err := os.ReadFile(recorded(t, "small.zip"))
	require.NoError(t, err)
	halfway, released := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(released) })
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Write(small[:1500])
		w.(http.Flusher).Flush()
		close(halfway)
		<-released
		w.Write(small[1500:])
	}))
	defer files.Close()
	defer release()
	conn := d.connect()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	err = conn.Call(ctx, "OTA.Update", `{"url":"`+files.URL+`","commit_timeout":300}`, nil)
	require.Error(t, err)
	<-halfway
	s := d.status()
	require.Equal(t, 1, s.State)
	require.Equal(t, "progress", s.Message)
	_, err = d.call("OTA.Update", `{"url":"`+files.URL+`"}`)
	require.EqualError(t, err, "remote error -1: Update is already in progress")
	_, err = d.call("OTA.Commit", "")
	require.ErrorContains(t, err, "remote error -1: ")
	release()
	require.EqualValues(t, 1, d.afterBoot(2).Slot)
	require.Equal(t, "null", d.must("OTA.Commit", ""))
}
