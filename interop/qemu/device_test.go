package qemu_test

import (
	"strconv"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/interop/qemu"
)

// device is a machine with a boot loader, and what to expect of the loader.
type device struct {
	*factory
	v1    *image // in slot 0, where it begins
	power func() *machine
	// starts is what the loader writes before it starts a slot, refuses what it
	// writes if it cannot load the kernel of slot 1; "" if it does not say.
	starts  [2]string
	refuses string
	resets  bool // somebody must reset the machine then
	// armed says that the loader starts a watchdog, which also ends a hang before
	// any driver, and which nobody can stop.
	armed bool
	// selected checks with the loader's own tool what the next boot does.
	selected func(slot int, trial bool)
}

// started waits for the loader to start a slot.
func (d *device) started(m *machine, slot int) {
	d.t.Helper()
	if d.starts[slot] != "" {
		m.await(*bootLimit, d.starts[slot])
	}
}

// test is the life of a device: updates that fail in every way, and one that is
// committed.
func (d *device) test() {
	t := d.t
	good := d.image("v2", "", nil)
	v2 := d.bundle(good)
	m := d.power()
	settled := func(slot int, version string) qemu.Report {
		t.Helper()
		d.started(m, slot)
		r := m.ready(slot, version)
		require.True(t, r.Committed)
		require.Equal(t, slot, r.Active)
		d.selected(slot, false)
		return r
	}
	install := func(url string, timeout int) {
		t.Helper()
		r := m.do("update %s %d", url, timeout)
		require.Equal(t, 1, r.Active)
		require.False(t, r.Committed)
		d.selected(1, true)
		m.log("installed: %d bytes written, %d in place", r.Written, r.Skipped)
		m.send("reboot")
	}
	trial := func() {
		t.Helper()
		d.started(m, 1)
		require.True(t, m.ready(1, "v2").Trial)
	}
	back := func(reason string) {
		t.Helper()
		r := settled(0, "v1")
		require.Equal(t, "reverted", r.Outcome)
		require.Equal(t, reason, r.Reason)
		require.Equal(t, 1, r.LastSlot)
		m.log("back in slot 0: %s", r.Reason)
	}
	const (
		fellBack = "boot loader fell back"
		ages     = 36000 // seconds; clocks of guests run fast on a busy host
	)

	settled(0, "v1")
	m.log("a trial that nobody commits")
	const timeout = 15
	install(v2, timeout)
	trial()
	_, match := m.await(*bootLimit, "^"+qemu.Prefix+qemu.Phase+` storing ([0-9.]+)`)
	up, err := strconv.ParseFloat(match[1], 64)
	require.NoError(t, err)
	m.log("reverts %.1fs after boot", up)
	require.GreaterOrEqual(t, up, float64(timeout))
	m.await(*bootLimit, "reboot: Restarting system")
	back("commit timeout")

	m.log("a panic in the new image")
	install(d.bundle(d.image("panics", "exit", nil)), ages)
	d.started(m, 1)
	m.await(*bootLimit, panicLine)
	back(fellBack)

	m.log("a kernel that cannot be loaded")
	install(d.bundle(d.image("unloadable", "", []byte("this is no kernel"))), ages)
	if d.refuses != "" {
		m.await(*bootLimit, d.refuses)
	}
	if d.resets {
		m.cut()
		m = d.power()
	}
	back(fellBack)

	m.log("a hang of the process that holds the watchdog")
	install(v2, ages)
	trial()
	m.send("hang")
	m.await(*bootLimit, "^"+qemu.Prefix+qemu.Hang)
	back(fellBack)

	if d.armed {
		m.log("a hang before any driver")
		install(d.bundle(d.image("hangs", "hang", nil)), ages)
		d.started(m, 1)
		m.await(*bootLimit, "^"+qemu.Prefix+qemu.Hang)
		back(fellBack)
	}

	m.log("a commit")
	m.holds(d.v1)
	install(v2, ages)
	trial()
	m.holds(good)
	r := m.do("commit")
	require.Equal(t, "committed", r.Outcome)
	require.Equal(t, map[bool]string{false: "inactive", true: "active"}[d.armed], r.Watchdog)
	d.selected(1, false)
	m.send("reboot")
	require.Equal(t, "committed", settled(1, "v2").Outcome)
	m.holds(good)
	m.off()
}
