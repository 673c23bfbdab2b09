package fileflash

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/slotota/ota"
	"github.com/stretchr/testify/require"
)

const mountinfoHead = "21 1 179:2 / / ro,relatime shared:1 - ext4 /dev/root ro\n" +
	"22 21 0:20 / /proc rw,nosuid shared:12 - proc proc rw\n" +
	"23 21 0:5 / /dev rw - devtmpfs udev rw,size=1k\n"

func writeFile(t *testing.T, path, s string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
	require.NoError(t, os.WriteFile(path, []byte(s), 0o600))
}

func TestMountPoint(t *testing.T) {
	for _, c := range []struct {
		name, text string
		dev        devno
		want       string
		fails      bool
	}{
		{"root", mountinfoHead, "179:2", "/", false},
		{"not mounted", mountinfoHead, "179:3", "", false},
		{"no prefix match", mountinfoHead, "179:20", "", false},
		{"no suffix match", mountinfoHead, "79:2", "", false},
		{"space in the name", "30 21 8:1 / /mnt/my\\040disk\\134x rw - vfat /dev/sda1 rw\n", "8:1", `/mnt/my disk\x`, false},
		{"several optional fields", "30 21 8:1 / /a rw shared:1 master:2 propagate_from:3 - vfat x rw\n", "8:1", "/a", false},
		{"no optional fields, empty source", "30 21 8:1 / /a rw - tmpfs  rw\n", "8:1", "/a", false},
		{"no source", "30 21 8:1 / /a rw - tmpfs\n", "8:1", "/a", false},
		{"long line", "30 21 0:9 / /o rw - overlay o " + strings.Repeat("lowerdir=/x:", 9000) + "\n31 21 8:1 / /a rw - x y z\n", "8:1", "/a", false},
		{"line too long", strings.Repeat("x", 1<<20+1), "8:1", "", true},
		{"no separator", "30 21 8:1 / /a rw vfat /dev/sda1 rw\n", "8:1", "", true},
		{"short", "30 21\n", "8:1", "", true},
		{"separator too early", "30 21 8:1 - /a rw\n", "8:1", "", true},
		{"empty", "", "8:1", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "mountinfo")
			writeFile(t, path, c.text)
			got, err := mountPoint(path, []devno{c.dev})
			if c.fails {
				require.Error(t, err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.want, got)
		})
	}
	_, err := mountPoint(filepath.Join(t.TempDir(), "none"), []devno{"8:1"})
	require.ErrorIs(t, err, fs.ErrNotExist, "not knowing is not a no")
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "/a": "/a", `\040`: " ", `a\011b\012`: "a\tb\n", `\134`: `\`, `\04`: `\04`, `\999`: `\999`, `\777`: `\777`, `x\`: `x\`,
	} {
		require.Equal(t, want, unescape(in))
	}
}

func TestNumber(t *testing.T) {
	require.Equal(t, devno("8:1"), number(0x801))
	require.Equal(t, devno("179:2"), number(0xb302))
	// Major 259 (blkext) and minor 0x12345, as makedev(3) of glibc lays them out.
	major, minor := uint64(259), uint64(0x12345)
	rdev := major&0xfff<<8 | major&^0xfff<<32 | minor&0xff | minor&^0xff<<12
	require.Equal(t, devno("259:74565"), number(rdev))
	major, minor = 0x12345, 0xffffffff
	rdev = major&0xfff<<8 | major&^0xfff<<32 | minor&0xff | minor&^0xff<<12
	require.Equal(t, devno("74565:4294967295"), number(rdev))
}

// blockInfo is the Stat of a made-up block device.
type blockInfo struct {
	fs.FileInfo
	st syscall.Stat_t
}

func (b *blockInfo) Sys() any { return &b.st }

func blockDev(rdev uint64) *blockInfo {
	b := &blockInfo{st: syscall.Stat_t{Mode: syscall.S_IFBLK | 0o600}}
	setRdev(&b.st.Rdev, rdev)
	return b
}

func setRdev[T uint32 | uint64](p *T, v uint64) { *p = T(v) }

// disk makes a sysfs with disk 8:0 of partitions 8:1 and 8:2, and a loop device
// 7:0 with partition 259:0 that has backing as its file.
func disk(t *testing.T, backing string) string {
	t.Helper()
	sys := t.TempDir()
	for dir, dev := range map[string]string{
		"devices/virtual/block/loop0":         "7:0",
		"devices/virtual/block/loop0/loop0p1": "259:0",
		"devices/pci/block/sda":               "8:0",
		"devices/pci/block/sda/sda1":          "8:1",
		"devices/pci/block/sda/sda2":          "8:2",
	} {
		writeFile(t, filepath.Join(sys, dir, "dev"), dev+"\n")
		if base := filepath.Base(filepath.Dir(dir)); base != "block" {
			writeFile(t, filepath.Join(sys, dir, "partition"), "1\n")
		}
		link := filepath.Join(sys, "dev/block", dev)
		require.NoError(t, os.MkdirAll(filepath.Dir(link), 0o700))
		require.NoError(t, os.Symlink("../../"+dir, link))
	}
	writeFile(t, filepath.Join(sys, "devices/virtual/block/loop0/loop/backing_file"), backing+"\n")
	require.NoError(t, os.MkdirAll(filepath.Join(sys, "block"), 0o700))
	require.NoError(t, os.Symlink("../devices/virtual/block/loop0", filepath.Join(sys, "block/loop0")))
	require.NoError(t, os.Symlink("../devices/pci/block/sda", filepath.Join(sys, "block/sda")))
	return sys
}

func TestMounted(t *testing.T) {
	backing, other := image(t, 10), image(t, 10)
	sys := disk(t, backing)
	stat := func(path string) fs.FileInfo {
		info, err := os.Stat(path)
		require.NoError(t, err)
		return info
	}
	for _, c := range []struct {
		name    string
		info    fs.FileInfo
		mounted string // device
		refused bool
	}{
		{"partition itself", blockDev(0x801), "8:1", true},
		{"other partition", blockDev(0x801), "8:2", false},
		{"disk around the partition", blockDev(0x801), "8:0", true},
		{"partition of the disk", blockDev(0x800), "8:2", true},
		{"disk itself", blockDev(0x800), "8:0", true},
		{"another disk", blockDev(0x800), "8:16", false},
		{"device without sysfs", blockDev(0xb303), "179:3", true},
		{"free device without sysfs", blockDev(0xb303), "179:2", false},
		{"file of a loop device", stat(backing), "7:0", true},
		{"file of a partitioned loop device", stat(backing), "259:0", true},
		{"file of a free loop device", stat(backing), "8:1", false},
		{"another file", stat(other), "7:0", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			proc := t.TempDir()
			writeFile(t, filepath.Join(proc, "self/mountinfo"), mountinfoHead+"30 21 "+c.mounted+" / /mnt/data rw - vfat x rw\n")
			err := mounted(c.info, proc, sys)
			if !c.refused {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, ErrInUse)
			require.ErrorContains(t, err, `"/mnt/data"`)
		})
	}

	// Without procfs nothing is known, so nothing is written.
	require.ErrorIs(t, mounted(blockDev(0x801), t.TempDir(), sys), fs.ErrNotExist)
	require.NoError(t, mounted(stat(other), t.TempDir(), sys), "a file that backs no device needs no procfs")
	require.NoError(t, mounted(stat(other), t.TempDir(), t.TempDir()))
}

func TestOddFiles(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	require.NoError(t, syscall.Mkfifo(fifo, 0o600))
	for _, path := range []string{fifo, "/dev/null", "/dev/zero"} {
		for _, o := range []*Options{nil, {ReadOnly: true}, {Create: true, Size: 10}} {
			_, err := Open(path, o)
			require.ErrorIs(t, err, ota.ErrInvalid, path)
		}
	}
}

func TestUnreadable(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may do everything")
	}
	path := image(t, 10)
	require.NoError(t, os.Chmod(path, 0))
	_, err := Open(path, nil)
	require.ErrorIs(t, err, fs.ErrPermission)
}

func command(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	b, err := exec.Command(name, args...).CombinedOutput()
	return strings.TrimSpace(string(b)), err
}

// loopDevice returns a block device of n bytes.
func loopDevice(t *testing.T, n int) (dev, backing string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a loop device")
	}
	backing = image(t, n)
	dev, err := command(t, "losetup", "--find", "--show", backing)
	if err != nil {
		t.Skip("no loop device to be had:", dev, err)
	}
	t.Cleanup(func() {
		if out, err := command(t, "losetup", "--detach", dev); err != nil {
			t.Error("detach", dev, out, err)
		}
	})
	return dev, backing
}

func TestLoopDevice(t *testing.T) {
	dev, backing := loopDevice(t, 1<<20)
	f, err := Open(dev, &Options{Size: 1 << 20})
	require.NoError(t, err)
	defer f.Close()
	require.EqualValues(t, 1<<20, f.Size())
	_, err = Open(dev, nil)
	require.ErrorIs(t, err, ErrInUse)

	_, err = f.WriteAt([]byte("block"), 1<<20-5)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("block"), 1<<20-4)
	require.ErrorIs(t, err, ota.ErrTooLarge)
	require.NoError(t, f.Sync())
	b, err := os.ReadFile(backing)
	require.NoError(t, err)
	require.Equal(t, "block", string(b[1<<20-5:]))
	require.NoError(t, f.Close())

	_, err = Open(dev, &Options{Size: 1<<20 - 512})
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, err = Open(dev, &Options{Size: 1<<20 - 512, Create: true})
	require.ErrorIs(t, err, ota.ErrInvalid, "creating never touches a device")
}

func TestMountedLoopDevice(t *testing.T) {
	dev, backing := loopDevice(t, 1<<20)
	if out, err := command(t, "mkfs.ext2", "-q", dev); err != nil {
		t.Skip("mkfs.ext2:", out, err)
	}
	dir := t.TempDir()
	if out, err := command(t, "mount", "-t", "ext2", "-o", "ro", dev, dir); err != nil {
		t.Skip("mount:", out, err)
	}
	unmounted := false
	defer func() {
		if !unmounted {
			if out, err := command(t, "umount", dir); err != nil {
				t.Error("umount", dir, out, err)
			}
		}
	}()
	for _, path := range []string{dev, backing} {
		_, err := Open(path, nil)
		require.ErrorIs(t, err, ErrInUse, path)
		require.ErrorContains(t, err, dir)
		f := openT(t, path, &Options{ReadOnlyIfMounted: true})
		require.True(t, f.ReadOnly())
		_, err = f.WriteAt([]byte{1}, 0)
		require.ErrorIs(t, err, ota.ErrReadOnly)
		require.NoError(t, f.Close())
	}
	out, err := command(t, "umount", dir)
	require.NoError(t, err, out)
	unmounted = true

	f := openT(t, dev, &Options{ReadOnlyIfMounted: true})
	require.False(t, f.ReadOnly())
	_, err = command(t, "mount", "-t", "ext2", "-o", "ro", dev, dir)
	require.Error(t, err, "mounted what is claimed")
	require.NoError(t, f.Close())
}
