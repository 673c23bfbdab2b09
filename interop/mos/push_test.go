package mos_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	mosota "github.com/mongoose-os/mos/cli/ota"
	"github.com/mongoose-os/mos/common/fwbundle"
	"github.com/mongoose-os/mos/common/mgrpc/frame"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/rpcjson"
)

// push runs `mos ota FILE`. Each of its flags is set, because it keeps them in
// global variables; more come last and win.
func (d *rig) push(file string, more ...string) error {
	d.t.Helper()
	args := append([]string{"--chunk-size=512", "--update-timeout=600s", "--commit-timeout=300s", "ota", file}, more...)
	require.NoError(d.t, pflag.CommandLine.Parse(args))
	return mosota.OTA(d.t.Context(), d.connect())
}

// offsets returns the offsets of the OTA.Write calls so far, in order.
func (d *rig) offsets() (offs []int64) {
	d.t.Helper()
	for _, f := range d.requests() {
		if f.Method == "OTA.Write" {
			offs = append(offs, offset(&f))
		}
	}
	return offs
}

// offset returns the offset of an OTA.Write call, -1 if it has none.
func offset(f *frame.Frame) int64 {
	p := struct{ Offset int64 }{-1}
	if json.Unmarshal(f.Params, &p) != nil {
		return -1
	}
	return p.Offset
}

// atOffset lets what happen to the first count OTA.Write calls at off.
func atOffset(off int64, count int, what fault) func(*frame.Frame) fault {
	return func(f *frame.Frame) fault {
		if f.Method != "OTA.Write" || offset(f) != off || count == 0 {
			return none
		}
		count--
		return what
	}
}

// requireSmall checks that slot holds the content of small.zip.
func (d *rig) requireSmall(slot ota.SlotID) {
	d.t.Helper()
	b, err := fwbundle.ReadZipFirmwareBundle(recorded(d.t, "small.zip"))
	require.NoError(d.t, err)
	for i, name := range []string{"app", "fs"} {
		want, err := b.GetPartData(name)
		require.NoError(d.t, err)
		require.Equal(d.t, want, d.part(slot, i, len(want)), name)
	}
}

// What mos create-fw-bundle --compress makes is installed, although no genuine device
// takes it.
func TestPushCompressed(t *testing.T) {
	d := newRig(t, rigOptions{})
	require.NoError(t, d.push(recorded(t, "compressed.zip")))
	d.afterBoot(2)
	d.requireSmall(1)
	require.Equal(t, "null", d.must("OTA.Commit", ""))
}

// The whole way of an update, with a call and a reply that get lost.
func TestPushAndCommit(t *testing.T) {
	lostCall, lostReply := atOffset(512, 1, loseCall), atOffset(1024, 2, loseReply)
	d := newRig(t, rigOptions{fault: func(f *frame.Frame) fault { return lostCall(f) + lostReply(f) }})
	require.NoError(t, d.push(recorded(t, "small.zip")))
	require.Equal(t, []int64{0, 512, 512, 1024, 1024, 1024, 1536, 2048}, d.offsets())
	require.Equal(t, "OTA.Status", d.methods()[0])
	require.Equal(t, "OTA.Begin", d.methods()[1])
	require.Equal(t, "OTA.End", d.methods()[10])

	h := d.afterBoot(2)
	require.EqualValues(t, 1, h.Slot)
	require.True(t, h.FirstBoot)
	require.True(t, h.Verified)
	require.NoError(t, h.Problem)
	d.requireSmall(1)
	require.Equal(t, `{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 300}`, d.must("OTA.GetBootState", ""))
	require.Equal(t, status{State: 0, Message: "idle", CommitTimeout: 300, Partition: 1}, d.status())

	// A second update has to wait for the commit.
	require.ErrorContains(t, d.push(recorded(t, "small.zip")), "unable to start an update: remote error -1: Update failed to start")

	require.Equal(t, "null", d.must("OTA.Commit", ""))
	require.Equal(t, committed1, d.must("OTA.GetBootState", ""))
	d.refused("OTA.Commit", "", "remote error -1: ")
	d.refused("OTA.Revert", "", "remote error -1: ")
	for range 2 {
		h = d.powerCycle()
		require.EqualValues(t, 1, h.Slot)
		require.False(t, h.FirstBoot)
	}

	// And the other way.
	require.NoError(t, d.push(recorded(t, "small.zip"), "--chunk-size=333", "--commit-timeout=0s"))
	h = d.afterBoot(5)
	require.EqualValues(t, 0, h.Slot)
	d.requireSmall(0)
	require.Eventually(t, func() bool { return d.must("OTA.GetBootState", "") == committed0 }, deadline, poll)
}

// Nobody commits, and the device is reset.
func TestPushAndReset(t *testing.T) {
	d := newRig(t, rigOptions{})
	require.NoError(t, d.push(recorded(t, "small.zip")))
	require.EqualValues(t, 1, d.afterBoot(2).Slot)
	require.EqualValues(t, 0, d.powerCycle().Slot)
	d.requireRolledBack("reset before commit")
	d.requireFactory()

	// It can be tried again at once.
	require.NoError(t, d.push(recorded(t, "small.zip")))
	require.EqualValues(t, 1, d.afterBoot(4).Slot)
	require.Equal(t, "null", d.must("OTA.Commit", ""))
}

// Nobody commits in time, without a reset.
func TestPushAndTimeout(t *testing.T) {
	d := newRig(t, rigOptions{})
	require.NoError(t, d.push(recorded(t, "small.zip"), "--commit-timeout=1s"))
	require.EqualValues(t, 0, d.afterBoot(3).Slot)
	d.requireRolledBack("commit timeout")
}

// The power fails at any operation on the flash, from OTA.Begin to OTA.Commit and
// the boots between and after. What runs then is one of the two firmwares, whole;
// a commit that was answered holds; and the device can be updated.
func TestPushAndPowerCut(t *testing.T) {
	// update reports whether the client was told that the commit succeeded.
	update := func(d *rig) bool {
		if d.push(recorded(t, "small.zip")) != nil {
			return false
		}
		if d.powerCycle().Slot == 0 {
			return false
		}
		_, err := d.call("OTA.Commit", "")
		return err == nil
	}
	d := newRig(t, rigOptions{})
	first := d.chip.Ops()
	require.True(t, update(d))
	ops := d.chip.Ops() - first
	require.Greater(t, ops, 20)
	for n := range ops {
		modes := memflash.TearModes(uint64(n))
		cut := modes[n%len(modes)]
		d := newRig(t, rigOptions{})
		cut.At = d.chip.Ops() + n
		d.chip.Plan(cut)
		told := update(d)
		require.Zero(t, d.chip.Pending(), "cut %d", n)

		h := d.powerCycle()
		state := d.must("OTA.GetBootState", "")
		switch {
		case told:
			require.EqualValues(t, 1, h.Slot, "cut %d: the commit is lost", n)
			require.Equal(t, committed1, state)
		case h.Slot == 0:
			require.Equal(t, committed0, state, "cut %d", n)
		}
		if h.Slot == 0 {
			d.requireFactory()
		} else {
			d.requireSmall(1)
		}
		if state != committed0 && state != committed1 {
			require.Equal(t, "null", d.must("OTA.Commit", ""), "cut %d", n)
		}
		require.NoError(t, d.push(recorded(t, "small.zip")), "cut %d: the next one", n)
		require.EqualValues(t, 1-h.Slot, d.powerCycle().Slot, "cut %d", n)
		d.requireSmall(1 - h.Slot)
		d.close()
	}
}

// requireRolledBack checks that the device is in slot 0 again and says why.
func (d *rig) requireRolledBack(why string) {
	d.t.Helper()
	require.Equal(d.t, committed0, d.must("OTA.GetBootState", ""))
	require.Contains(d.t, d.must("Sys.GetInfo", ""), `"fw_version": "1.0"`)
	s := d.status()
	require.Equal(d.t, 2, s.State)
	require.Contains(d.t, s.Message, why)
	d.refused("OTA.Commit", "", "remote error -1: ") // too late
	require.Equal(d.t, committed0, d.must("OTA.GetBootState", ""))
}

// The flash takes longer than the client waits: it repeats what is being written.
func TestPushToSlowFlash(t *testing.T) {
	d := newRig(t, rigOptions{timeout: 3 * time.Second})
	d.chip.Plan(memflash.Fault{Kind: memflash.Slow, Delay: 4 * time.Second, At: d.chip.Ops(), On: memflash.OpErase})
	require.NoError(t, d.push(recorded(t, "small.zip")))
	require.Zero(t, d.chip.Pending())
	require.Greater(t, len(d.offsets()), 5, "something was repeated")
	require.EqualValues(t, 1, d.powerCycle().Slot)
	d.requireSmall(1)
}

// The client gives up after three attempts, and ends the session.
func TestPushGivenUp(t *testing.T) {
	d := newRig(t, rigOptions{fault: atOffset(1024, 3, loseCall)})
	require.ErrorContains(t, d.push(recorded(t, "small.zip")), "write failed at offset 1024")
	require.Equal(t, []int64{0, 512, 1024, 1024, 1024}, d.offsets())
	require.Equal(t, "OTA.End", d.methods()[len(d.methods())-1])
	require.Equal(t, committed0, d.must("OTA.GetBootState", ""))
	require.Equal(t, 2, d.status().State)
	require.NoError(t, d.push(recorded(t, "small.zip")))
	require.EqualValues(t, 1, d.afterBoot(2).Slot)
}

// The session of another client, and how the client's message says to end it.
func TestPushBusy(t *testing.T) {
	d := newRig(t, rigOptions{})
	require.Equal(t, "null", d.must("OTA.Begin", `{"timeout":600,"commit_timeout":300,"size":2558}`))
	require.Equal(t, "null", d.must("OTA.Write", `{"offset":0,"data":"UEsD"}`))
	d.refused("OTA.Write", `{"offset":2,"data":"UEsD"}`, "remote error -1: Expected offset 3, got 2")
	d.refused("OTA.Write", `{"offset":3}`, "remote error -1: Data required")
	_, err := d.call("OTA.Write", `{"offset":3,"data":"*"}`)
	require.ErrorContains(t, err, "remote error ")
	require.EqualError(t, d.push(recorded(t, "small.zip")), "update is already in progress (1), call OTA.End")
	_, err = d.call("OTA.Begin", `{"size":1}`)
	require.ErrorContains(t, err, "remote error -1: Update failed to start")
	_, err = d.call("OTA.Update", `{"url":"http://127.0.0.1:1/"}`)
	require.ErrorContains(t, err, "remote error -1: Update is already in progress")

	_, err = d.call("OTA.End", "")
	require.ErrorContains(t, err, "Unexpected end of data")
	require.Equal(t, 2, d.status().State)
	require.NoError(t, d.push(recorded(t, "small.zip"), `{"commit_timeout":"60"}`)) // args of its own
	d.afterBoot(2)
	require.Equal(t, `{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 60}`, d.must("OTA.GetBootState", ""))
}

// Bundles that must not be installed: what the client says, and that the device
// stays as it is.
func TestPushRefused(t *testing.T) {
	small, err := os.ReadFile(recorded(t, "small.zip"))
	require.NoError(t, err)
	damaged := func(at int) []byte {
		b := bytes.Clone(small)
		b[at] ^= 1
		return b
	}
	data := bytes.Index(small, []byte("hello fs image"))
	require.Positive(t, data)
	nofs, err := os.ReadFile(recorded(t, "nofs.zip"))
	require.NoError(t, err)
	for _, c := range []struct {
		name   string
		zip    []byte
		errs   string
		erased bool // the target slot may have lost its content
	}{
		{"without a part", nofs, "lacks a part", false},
		{"no zip", []byte("#!/bin/sh\nreboot\n" + string(make([]byte, 100))), "-1 Malformed archive (invalid header)", false},
		{"damaged manifest", damaged(60), "-11 Invalid CRC", false},
		{"damaged data", damaged(data), "-11 Invalid CRC", true},
		{"cut short", small[:len(small)-1], "Unexpected end of data", true},
		{"empty", nil, "Unexpected end of data", false},
		{"too large", zipOf(t, "demo", "esp32", appSize+1, nil, false), "too large", false},
		{"another platform", zipOf(t, "demo", "esp32c3", 100, nil, false), "another platform", false},
		{"another product", zipOf(t, "other", "esp32", 100, nil, false), "another product", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newRig(t, rigOptions{})
			file := filepath.Join(t.TempDir(), "fw.zip")
			require.NoError(t, os.WriteFile(file, c.zip, 0o600))
			require.ErrorContains(t, d.push(file), c.errs)
			s := d.status()
			require.Equal(t, 2, s.State)
			require.NotEqual(t, "error", s.Message)
			require.Equal(t, committed0, d.must("OTA.GetBootState", ""))
			d.requireFactory()
			if !c.erased {
				require.Zero(t, sum(d.chip.Wear(2))+sum(d.chip.Wear(3)), "nothing erased")
			}
			require.NoError(t, d.push(recorded(t, "small.zip")), "the next one")
			require.EqualValues(t, 1, d.powerCycle().Slot)
		})
	}
}

func sum(v []int) (n int) {
	for _, i := range v {
		n += i
	}
	return n
}

// zipOf returns a bundle made by the genuine writer, with an app of that size.
func zipOf(t *testing.T, name, platform string, size int, signers []crypto.Signer, compress bool) []byte {
	t.Helper()
	b := newBundle(t, name, platform, size)
	var buf bytes.Buffer
	require.NoError(t, fwbundle.WriteSignedZipFirmwareBytes(b, &buf, compress, signers, nil))
	return buf.Bytes()
}

func newBundle(t *testing.T, name, platform string, size int) *fwbundle.FirmwareBundle {
	t.Helper()
	b := fwbundle.NewBundle()
	b.Name, b.Platform, b.Version, b.BuildID = name, platform, "2.0", "20260202-000000/next"
	for spec, n := range map[string]int{
		"app:type=app,src=app.bin,ptn=app_0,encrypt=true":              size,
		"fs:type=fs,src=dir/fs.img,fs_size=16384,ptn=fs_0,fs_kind=LFS": 3000,
		"boot:type=boot,src=boot.bin,addr=0x1000,update=false":         700,
		"nvs:type=nvs,size=16384,fill=255,ptn=nvs":                     0,
	} {
		_, p, err := fwbundle.PartFromString(spec)
		require.NoError(t, err)
		if n > 0 {
			data := make([]byte, n)
			rand.Read(data)
			p.SetData(data)
		}
		require.NoError(t, b.AddPart(p))
	}
	return b
}

// A client that only looks is served while another one installs.
func TestPushWatched(t *testing.T) {
	d := newRig(t, rigOptions{})
	file := filepath.Join(t.TempDir(), "fw.zip")
	require.NoError(t, os.WriteFile(file, zipOf(t, "demo", "esp32", appSize, nil, false), 0o600))
	conn := d.connect()
	done := make(chan struct{})
	seen := make(chan []status, 1)
	go func() {
		var all []status
		defer func() { seen <- all }()
		for {
			select {
			case <-done:
				return
			default:
			}
			var s status
			if err := conn.Call(t.Context(), "OTA.Status", nil, &s); err != nil {
				t.Errorf("OTA.Status: %v", err)
				return
			}
			all = append(all, s)
		}
	}()
	err := d.push(file)
	close(done)
	all := append(<-seen, d.status())
	require.NoError(t, err)
	last := 0
	for _, s := range all {
		require.GreaterOrEqual(t, s.Progress, last, "%+v", s)
		require.Contains(t, []int{0, 1, 3}, s.State)
		last = s.Progress
	}
	require.Equal(t, status{State: 3, Message: "Update applied, rebooting", Progress: 100, CommitTimeout: 300, Partition: 1}, all[len(all)-1])
	require.EqualValues(t, 1, d.afterBoot(2).Slot)
}

// A signed update of a size near that of the slot, in chunks near the limit of
// genuine devices and of ours; and ones without the right signatures.
func TestPushSigned(t *testing.T) {
	keys := newKeys(t, 3)
	d := newRig(t, rigOptions{policy: &bundle.Policy{
		Keys:     []*ecdsa.PublicKey{&keys[0].PublicKey, nil, &keys[2].PublicKey},
		Required: 5,
	}})
	push := func(chunk string, signers ...crypto.Signer) error {
		file := filepath.Join(t.TempDir(), "fw.zip")
		require.NoError(t, os.WriteFile(file, zipOf(t, "demo", "esp32", appSize-10, signers, false), 0o600))
		return d.push(file, "--chunk-size="+chunk)
	}
	for _, signers := range [][]crypto.Signer{
		nil,
		{keys[0]},
		{nil, nil, keys[2]},
		{keys[2], nil, keys[0]},
		{keys[0], nil, keys[1]},
		{keys[0], nil, keys[0]},
	} {
		require.ErrorContains(t, push("2900", signers...), "remote error -1: -18 Signature verification failed")
		require.Equal(t, status{State: 2, Message: "Signature verification failed", IsCommitted: true}, d.idleStatus())
	}
	require.ErrorContains(t, d.push(recorded(t, "signed.zip")), "-18 Signature verification failed")
	require.Zero(t, sum(d.chip.Wear(2))+sum(d.chip.Wear(3)), "nothing erased")

	require.NoError(t, push("2900", keys[0], nil, keys[2]))
	require.EqualValues(t, 1, d.afterBoot(2).Slot)
	require.Equal(t, "null", d.must("OTA.Commit", ""))
	require.Contains(t, d.must("Sys.GetInfo", ""), `"fw_version": "2.0", "fw_id": "20260202-000000/next"`)

	require.NoError(t, push("90000", keys[0], keys[1], keys[2]), "more signatures than needed")
	require.EqualValues(t, 0, d.afterBoot(3).Slot)
}

// idleStatus is status without the progress made before a failure.
func (d *rig) idleStatus() status {
	s := d.status()
	s.Progress = 0
	return s
}

func newKeys(t *testing.T, n int) (keys []*ecdsa.PrivateKey) {
	t.Helper()
	for range n {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		require.NoError(t, err)
		keys = append(keys, k)
	}
	return keys
}

// A chunk that no buffer of the device can hold.
func TestPushChunkTooLarge(t *testing.T) {
	d := newRig(t, rigOptions{})
	file := filepath.Join(t.TempDir(), "fw.zip")
	require.NoError(t, os.WriteFile(file, zipOf(t, "demo", "esp32", 200_000, nil, false), 0o600))
	err := d.push(file, "--chunk-size=150000")
	require.ErrorContains(t, err, "write failed at offset 0: server returned an error: &{413 Request Entity Too Large")
	require.Equal(t, committed0, d.must("OTA.GetBootState", ""))
	require.NoError(t, d.push(recorded(t, "small.zip")))
	require.EqualValues(t, 1, d.powerCycle().Slot)
}

// A Write that the device fails is sent again.
func TestPushFailedWrite(t *testing.T) {
	var mu sync.Mutex
	writes := 0
	d := newRig(t, rigOptions{auth: rpcjson.AuthorizerFunc(func(_ context.Context, _ *rpcjson.Peer, method string, _ rpcjson.Right) error {
		mu.Lock()
		defer mu.Unlock()
		if method == "OTA.Write" {
			if writes++; writes == 3 {
				return &rpcjson.Error{Code: -1, Message: "injected"}
			}
		}
		return nil
	})})
	require.NoError(t, d.push(recorded(t, "small.zip")))
	require.Equal(t, []int64{0, 512, 1024, 1024, 1536, 2048}, d.offsets())
	require.EqualValues(t, 1, d.afterBoot(2).Slot)
	d.requireSmall(1)
}
