package fileflash

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"unicode/utf16"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

const (
	uuidA = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
	uuidB = "11223344-5566-7788-99aa-bbccddeeff00"
	linux = "0fc63daf-8483-4772-8e79-3d69d8477de4"
)

func rawGUID(s string) []byte {
	var a uint32
	var b, c uint16
	var d, e []byte
	_, err := fmt.Sscanf(s, "%08x-%04x-%04x-%4x-%12x", &a, &b, &c, &d, &e)
	if err != nil {
		panic(err)
	}
	le := binary.LittleEndian
	return append(append(le.AppendUint16(le.AppendUint16(le.AppendUint32(nil, a), b), c), d...), e...)
}

// gptDisk makes a disk of 256 sectors with two partitions.
func gptDisk(sector int, labels [2]string, uuids [2]string) []byte {
	const sectors = 256
	le := binary.LittleEndian
	disk := make([]byte, sectors*sector)
	disk[446+4] = 0xee
	le.PutUint32(disk[446+8:], 1)
	le.PutUint32(disk[446+12:], 0xffffffff)
	disk[510], disk[511] = 0x55, 0xaa
	entries := make([]byte, 128*128)
	for i := range 2 {
		e := entries[(i+i)*128:] // numbers 1 and 3
		copy(e, rawGUID(linux))
		copy(e[16:], rawGUID(uuids[i]))
		le.PutUint64(e[32:], uint64(64+32*i))
		le.PutUint64(e[40:], uint64(64+32*i+15))
		le.PutUint64(e[48:], 1<<uint(i))
		for k, u := range utf16.Encode([]rune(labels[i])) {
			le.PutUint16(e[56+2*k:], u)
		}
	}
	for _, at := range [][2]int{{1, 2}, {sectors - 1, sectors - 34}} {
		h := disk[at[0]*sector:][:sector]
		copy(h, "EFI PART\x00\x00\x01\x00")
		le.PutUint32(h[12:], 92)
		le.PutUint64(h[24:], uint64(at[0]))
		le.PutUint64(h[72:], uint64(at[1]))
		le.PutUint32(h[80:], 128)
		le.PutUint32(h[84:], 128)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
		copy(disk[at[1]*sector:], entries)
	}
	return disk
}

func TestGPT(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		disk := gptDisk(sector, [2]string{"rootfs-a", "Größe 36 Zeichen lang 12345678901234"}, [2]string{uuidA, uuidB})
		want := []Partition{
			{Number: 1, Start: 64 * int64(sector), Size: 16 * int64(sector), Label: "rootfs-a", UUID: uuidA, Type: linux, Attributes: 1},
			{Number: 3, Start: 96 * int64(sector), Size: 16 * int64(sector), Label: "Größe 36 Zeichen lang 12345678901234", UUID: uuidB, Type: linux, Attributes: 2},
		}
		read := func(disk []byte) ([]Partition, error) {
			return ReadPartitions(bytes.NewReader(disk), int64(len(disk)), int64(sector))
		}
		got, err := read(disk)
		require.NoError(t, err)
		require.Equal(t, want, got)

		// Any damage to one copy is noticed, and the other one is taken.
		primary, backup := []int{sector + 3, sector + 40, 2*sector + 20}, []int{255*sector + 3, 255*sector + 89, (256-34)*sector + 300}
		for _, off := range append(primary, backup...) {
			d := bytes.Clone(disk)
			d[off] ^= 4
			got, err := read(d)
			require.NoError(t, err, off)
			require.Equal(t, want, got, off)
		}
		for i := range primary {
			d := bytes.Clone(disk)
			d[primary[i]] ^= 4
			d[backup[i]] ^= 4
			_, err := read(d)
			require.ErrorIs(t, err, ota.ErrInvalid)
		}
		_, err = read(disk[:sector+100])
		require.Error(t, err)
	}
	for _, sector := range []int64{0, 511, 1000, 128 << 10} {
		_, err := ReadPartitions(bytes.NewReader(nil), 1<<20, sector)
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
	_, err := ReadPartitions(bytes.NewReader(make([]byte, 4096)), 4096, 512)
	require.ErrorIs(t, err, ota.ErrInvalid)
}

func TestMBR(t *testing.T) {
	disk := make([]byte, 1<<20)
	le := binary.LittleEndian
	le.PutUint32(disk[440:], 0x6c586e13)
	for i, typ := range []byte{0x0c, 0, 0x83, 0x83} {
		e := disk[446+16*i:]
		e[4] = typ
		le.PutUint32(e[8:], uint32(100*(i+1)))
		le.PutUint32(e[12:], uint32(50+i*i*i*100)) // the last one does not fit
	}
	disk[510], disk[511] = 0x55, 0xaa
	got, err := ReadPartitions(bytes.NewReader(disk), int64(len(disk)), 512)
	require.NoError(t, err)
	require.Equal(t, []Partition{
		{Number: 1, Start: 100 * 512, Size: 50 * 512, UUID: "6c586e13-01", Type: "0c"},
		{Number: 3, Start: 300 * 512, Size: 850 * 512, UUID: "6c586e13-03", Type: "83"},
	}, got)
}

// What sgdisk writes is read.
func TestSgdisk(t *testing.T) {
	tool, err := exec.LookPath("sgdisk")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs the package gdisk")
		}
		t.Skip("needs sgdisk: install the package gdisk")
	}
	name := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(name, make([]byte, 8<<20), 0o600))
	out, err := exec.Command(tool, "-o", "-n", "1:2048:4095", "-c", "1:boot", "-u", "1:"+uuidA, "-n", "5:4096:0", "-c", "5:rootfs b", "-u", "5:"+uuidB,
		"-t", "5:8300", name).CombinedOutput()
	require.NoError(t, err, string(out))
	disk, err := os.ReadFile(name)
	require.NoError(t, err)
	got, err := ReadPartitions(bytes.NewReader(disk), int64(len(disk)), 512)
	require.NoError(t, err)
	require.Len(t, got, 2)
	require.Equal(t, Partition{Number: 1, Start: 1 << 20, Size: 1 << 20, Label: "boot", UUID: uuidA, Type: linux}, got[0])
	require.Equal(t, "rootfs b", got[1].Label)
	require.Equal(t, uuidB, got[1].UUID)
}

func FuzzReadPartitions(f *testing.F) {
	f.Add(gptDisk(512, [2]string{"a", "b"}, [2]string{uuidA, uuidB}))
	f.Fuzz(func(t *testing.T, disk []byte) {
		parts, err := ReadPartitions(bytes.NewReader(disk), int64(len(disk)), 512)
		if err == nil {
			for _, p := range parts {
				if p.Start < 0 || p.Size < 0 || p.Start+p.Size > int64(len(disk)) || p.Number < 1 {
					t.Fatalf("%+v in %d bytes", p, len(disk))
				}
			}
		}
	})
}

// sysBlock makes sys and dev of a machine with two disks.
func sysBlock(t *testing.T, uuids [2]string) string {
	root := t.TempDir()
	for _, disk := range []struct {
		name, sep string
		labels    [2]string
		uuids     [2]string
		named     bool
	}{
		{"mmcblk0", "p", [2]string{"rootfs-a", "rootfs-b"}, [2]string{uuidA, uuids[0]}, true},
		{"sda", "", [2]string{"rootfs-a", "data"}, [2]string{"aa000000-0000-0000-0000-000000000000", uuids[1]}, false},
	} {
		dir := filepath.Join(root, "sys", "devices", "x", disk.name)
		put := func(name, content string) {
			require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o755))
			require.NoError(t, os.WriteFile(name, []byte(content), 0o600))
		}
		link := func(from, to string) {
			require.NoError(t, os.MkdirAll(filepath.Dir(to), 0o755))
			require.NoError(t, os.Symlink(from, to))
		}
		put(filepath.Join(dir, "uevent"), "DEVNAME="+disk.name+"\nDEVTYPE=disk\n")
		put(filepath.Join(dir, "queue", "logical_block_size"), "512\n")
		link(dir, filepath.Join(root, "sys", "class", "block", disk.name))
		put(filepath.Join(root, "dev", disk.name), string(gptDisk(512, disk.labels, disk.uuids)))
		for i, n := range []string{"1", "3"} {
			part := disk.name + disk.sep + n
			env := "DEVNAME=" + part + "\nDEVTYPE=partition\nPARTN=" + n + "\n"
			if disk.named {
				env += "PARTNAME=" + disk.labels[i] + "\n"
			}
			put(filepath.Join(dir, part, "uevent"), env)
			link(filepath.Join(dir, part), filepath.Join(root, "sys", "class", "block", part))
		}
	}
	return root
}

func TestFindPartition(t *testing.T) {
	root := sysBlock(t, [2]string{uuidB, "bb000000-0000-0000-0000-000000000000"})
	for name, want := range map[string]string{
		"PARTLABEL=rootfs-b": "mmcblk0p3",
		"PARTLABEL=data":     "sda3",
		"PARTUUID=" + uuidA:  "mmcblk0p1",
		"PARTUUID=11223344-5566-7788-99AA-BBCCDDEEFF00": "mmcblk0p3",
	} {
		got, err := FindPartition(root, name)
		require.NoError(t, err, name)
		require.Equal(t, filepath.Join(root, "dev", want), got)
	}
	got, err := FindPartition(root, "/dev/sda1")
	require.NoError(t, err)
	require.Equal(t, "/dev/sda1", got)
	_, err = FindPartition(root, "PARTLABEL=rootfs-a")
	require.ErrorIs(t, err, ErrAmbiguous)
	require.ErrorContains(t, err, "mmcblk0p1")
	require.ErrorContains(t, err, "sda1")
	_, err = FindPartition(root, "PARTLABEL=ROOTFS-B")
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = FindPartition(root, "PARTUUID=")
	require.ErrorIs(t, err, ota.ErrInvalid)

	// A copied disk.
	_, err = FindPartition(sysBlock(t, [2]string{uuidB, uuidB}), "PARTUUID="+uuidB)
	require.ErrorIs(t, err, ErrAmbiguous)

	// A disk that cannot be read is named.
	require.NoError(t, os.WriteFile(filepath.Join(root, "dev", "sda"), []byte("x"), 0o600))
	got, err = FindPartition(root, "PARTLABEL=rootfs-b")
	require.NoError(t, err)
	require.Equal(t, filepath.Join(root, "dev", "mmcblk0p3"), got)
	_, err = FindPartition(root, "PARTLABEL=data")
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.ErrorContains(t, err, "sda")
	_, err = FindPartition(t.TempDir(), "PARTLABEL=data")
	require.ErrorIs(t, err, fs.ErrNotExist)
}

// The protection is lifted while the partition is open.
func TestBootPartition(t *testing.T) {
	dir := t.TempDir()
	dev, sys := filepath.Join(dir, "mmcblk0boot0"), filepath.Join(dir, "sys")
	ro := filepath.Join(sys, "block", "mmcblk0boot0", "force_ro")
	require.NoError(t, os.WriteFile(dev, make([]byte, 4096), 0o600))
	_, err := openBootPartition(sys, dev, nil)
	require.ErrorContains(t, err, "no boot partition")
	require.NoError(t, os.MkdirAll(filepath.Dir(ro), 0o755))
	for _, before := range []string{"1\n", "0\n"} {
		require.NoError(t, os.WriteFile(ro, []byte(before), 0o600))
		state := func() string {
			b, err := os.ReadFile(ro)
			require.NoError(t, err)
			return string(b)
		}
		b, err := openBootPartition(sys, dev, nil)
		require.NoError(t, err)
		require.Equal(t, "0\n", state())
		_, err = b.WriteAt([]byte("x"), 7)
		require.NoError(t, err)
		require.NoError(t, b.Sync())
		require.NoError(t, b.Close())
		require.NoError(t, b.Close())
		require.Equal(t, before, state())

		b, err = openBootPartition(sys, dev, &Options{ReadOnly: true})
		require.NoError(t, err)
		require.Equal(t, before, state())
		require.NoError(t, b.Close())

		_, err = openBootPartition(sys, dev, &Options{Size: 5})
		require.ErrorIs(t, err, ota.ErrInvalid)
		require.Equal(t, before, state(), "after an Open that failed")
	}
	_, err = openBootPartition(sys, dev, &Options{Create: true, Size: 5})
	require.ErrorIs(t, err, ota.ErrInvalid)
}
