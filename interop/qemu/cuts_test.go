package qemu_test

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/interop/qemu"
)

var (
	cuts = flag.Int("qemu.cuts", 30, "power cuts of one device")
	seed = flag.Uint64("qemu.seed", 1, "seed of the moments at which the power is cut")
)

// moment is one in the life of a device: it begins with a line on the console.
type moment struct {
	name    string
	pattern string
	lasts   time.Duration // measured once
}

// TestPowerCuts ends QEMU at random moments of updates. Whatever is interrupted, the
// next boot runs a complete image, one that was promised, and the update can be
// repeated.
func TestPowerCuts(t *testing.T) {
	needs(t, true, ubootTools)
	b := newUBoot(t)
	// All parts of them differ, so that all are written.
	kernel := b.read(b.k.image)
	images := map[string]*image{"v1": b.v1}
	urls := map[string]string{"v1": b.bundle(b.v1)}
	for _, v := range []string{"v2", "v3"} {
		images[v] = b.image(v, "", append(bytes.Clone(kernel), v...))
		urls[v] = b.bundle(images[v])
	}
	rnd := rand.New(rand.NewPCG(*seed, 0))
	t.Logf("-qemu.seed %d", *seed)

	moments := []moment{
		{name: "download"},
		{name: "write", pattern: qemu.Phase + " writing"},
		{name: "verify", pattern: qemu.Phase + " verifying"},
		{name: "store", pattern: qemu.Phase + " storing"},
		{name: "reboot", pattern: qemu.Phase + " done"},
		{name: "U-Boot", pattern: "^U-Boot "},
		{name: "kernel", pattern: "^Starting kernel"},
		{name: "trial", pattern: readyLine},
		{name: "commit"},
		{name: "committed", pattern: qemu.Phase + " done"},
	}
	commit := slices.IndexFunc(moments, func(m moment) bool { return m.name == "commit" })
	// life is an update of the running machine, up to what comes after moment last.
	life := func(m *machine, version string, last int) {
		for i := range last + 1 {
			switch moments[i].name {
			case "download":
				m.send("update %s 36000", urls[version])
			case "commit":
				m.send("commit")
			}
			if moments[i].pattern != "" {
				m.await(*bootLimit, moments[i].pattern)
			}
			if moments[i].name == "reboot" {
				m.send("reboot")
			}
			now := time.Now()
			if i > 0 && moments[i-1].lasts == 0 {
				moments[i-1].lasts = now.Sub(m.stage)
			}
			m.stage = now
		}
	}

	m := b.power("")
	m.ready(0, "v1")
	life(m, "v2", len(moments)-1)
	for i := range moments {
		moments[i].lasts = max(moments[i].lasts, 100*time.Millisecond)
		t.Logf("%-10s takes %v", moments[i].name, moments[i].lasts.Round(time.Millisecond))
	}
	m.await(*bootLimit, "^"+qemu.Prefix+qemu.Done)
	m.holds(images["v2"])
	m.cut()

	// What may run next, and what is in no slot.
	allowed := map[string]bool{"v2": true}
	next := "v3"
	count := map[string]int{}
	for i := 0; ; i++ {
		m = b.power("")
		_, match := m.await(*bootLimit, readyLine)
		r := m.parse(match[0])
		require.Contains(t, allowed, r.Version)
		require.Empty(t, r.Problem)
		m.holds(images[r.Version])
		require.Equal(t, "serial 42", b.variables()["board"])
		count[r.Version]++
		if !r.Committed {
			require.True(t, r.Trial)
			r = m.do("commit")
		}
		require.True(t, r.Committed)
		if i == *cuts {
			break
		}
		at := rnd.IntN(len(moments))
		begin := m.next
		life(m, next, at)
		delay := time.Duration(rnd.Int64N(int64(moments[at].lasts)*5/4 + 1))
		m.after(delay)
		m.cut()
		allowed = after(m.lines[begin:], r.Version, next, at >= commit)
		m.log("cut %d: %s to %s, %v after the begin of %s: then %s", i+1, r.Version, next, delay.Round(time.Millisecond), moments[at].name,
			strings.Join(slices.Sorted(maps.Keys(allowed)), " or "))
		for v := range images {
			if v != r.Version && v != next {
				next = v
				break
			}
		}
	}
	for _, v := range slices.Sorted(maps.Keys(count)) {
		t.Logf("%d boots of %s", count[v], v)
	}

	// The update that was cut so often succeeds now.
	life(m, next, len(moments)-1)
	m.send("reboot")
	_, match := m.await(*bootLimit, readyLine)
	r := m.parse(match[0])
	require.Equal(t, next, r.Version)
	require.True(t, r.Committed)
	m.holds(images[next])
	require.Equal(t, fmt.Sprintf("%c", 'A'+r.Running), b.variables()["BOOT_ORDER"])
	m.off()
}

// after returns which versions may run after a cut. lines are what the console said
// since the command to update from one version to the other. commit says that the
// command to commit was given.
func after(lines []string, from, to string, commit bool) map[string]bool {
	seen := func(pattern string) (n int) {
		re := regexp.MustCompile(pattern)
		for _, line := range lines {
			if re.MatchString(line) {
				n++
			}
		}
		return n
	}
	done := seen("^" + qemu.Prefix + qemu.Done)
	switch {
	case done == 2: // committed
		return map[string]bool{to: true}
	case commit:
		return map[string]bool{from: true, to: true}
	case seen("^LOADER slot ") > 0: // it had its one boot
		return map[string]bool{from: true}
	case done == 1: // it is selected
		return map[string]bool{to: true}
	case seen("^"+qemu.Prefix+qemu.Phase+" verifying") == 0: // it is not complete
		return map[string]bool{from: true}
	}
	return map[string]bool{from: true, to: true}
}
