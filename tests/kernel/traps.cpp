// Carries out the instructions of tiles of bfloat16 where a CPU takes them for illegal, one by one from their bytes, so
// that what a compiler made of the kernel runs as it is. It shares nothing with the emulation in tiles.hpp.
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

namespace {

struct Tile {
    int rows, bytes;
    uint8_t row[16][64];
};
Tile tiles[8];
bool configured = false;
int64_t carried_out = 0;

// Registers by their number in an instruction.
const int REGISTERS[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                         REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

float widened(const uint8_t* from) {
    const uint32_t bits = (uint32_t)from[1] << 24 | (uint32_t)from[0] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

bool product(Tile& sum, const Tile& a, const Tile& b) {
    if (sum.rows != a.rows || sum.bytes != b.bytes || a.bytes != 4 * b.rows) return false;
    for (int m = 0; m < sum.rows; ++m)
        for (int n = 0; n < sum.bytes; n += 4) {
            float value;
            memcpy(&value, sum.row[m] + n, 4);
            for (int k = 0; k < b.rows; ++k)
                value += widened(a.row[m] + 4 * k) * widened(b.row[k] + n) +
                         widened(a.row[m] + 4 * k + 2) * widened(b.row[k] + n + 2);
            memcpy(sum.row[m] + n, &value, 4);
        }
    return true;
}

bool configure(const uint8_t* at) {
    if (at[0] != 1 || at[1]) return false;
    for (int t = 0; t < 16; ++t) {
        const int rows = at[48 + t], bytes = at[16 + 2 * t] | at[17 + 2 * t] << 8;
        if (rows > 16 || bytes > 64 || !rows != !bytes || (t > 7 && rows)) return false;
        if (t < 8) memset(&tiles[t], 0, sizeof(Tile)), tiles[t].rows = rows, tiles[t].bytes = bytes;
    }
    return configured = true;
}

// The instruction's length; 0: none of those that are known here, or not allowed as things stand.
int carry_out(const uint8_t* at, const greg_t* registers) {
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || at[2] & 0x84) return 0;  // VEX, map 0F38, W 0, 128 bits
    const int prefix = at[2] & 3, opcode = at[3], mode = at[4] >> 6, reg = at[4] >> 3 & 7, rm = at[4] & 7;
    const int none = 0, f3 = 2, f2 = 3, extra_index = at[1] & 0x40 ? 0 : 8, extra_base = at[1] & 0x20 ? 0 : 8;
    if (mode == 3) {
        if (opcode == 0x49 && prefix == none && !reg && !rm) {
            configured = false;
            return 5;
        }
        if (!configured || !tiles[reg].rows) return 0;
        if (opcode == 0x49 && prefix == f2 && !rm) return memset(tiles[reg].row, 0, sizeof tiles[reg].row), 5;
        const int third = ~at[2] >> 3 & 15;
        return opcode == 0x5c && prefix == f3 && third < 8 && product(tiles[reg], tiles[rm], tiles[third]) ? 5 : 0;
    }
    int length = 5, base = rm, index = 4, scale = 0;
    if (rm == 4) base = at[5] & 7, index = (at[5] >> 3 & 7) | extra_index, scale = at[5] >> 6, length = 6;
    if (mode == 0 && base == 5) return 0;  // without a register: no compiler was seen to do it
    int64_t address = registers[REGISTERS[base | extra_base]];
    if (mode == 1) address += (int8_t)at[length], length += 1;
    if (mode == 2) {
        int32_t far;
        memcpy(&far, at + length, 4);
        address += far, length += 4;
    }
    uint8_t* memory = reinterpret_cast<uint8_t*>(address);
    if (opcode == 0x49 && prefix == none && !reg) return configure(memory) ? length : 0;
    if (opcode != 0x4b || rm != 4 || !configured || !tiles[reg].rows) return 0;
    const int64_t stride = index == 4 ? 0 : (int64_t)registers[REGISTERS[index]] << scale;
    Tile& tile = tiles[reg];
    if (prefix == f2) memset(tile.row, 0, sizeof tile.row);
    for (int i = 0; i < tile.rows; ++i, memory += stride) {
        if (prefix == f2) memcpy(tile.row[i], memory, (size_t)tile.bytes);
        else if (prefix == f3) memcpy(memory, tile.row[i], (size_t)tile.bytes);
        else return 0;
    }
    return length;
}

void illegal(int signal, siginfo_t*, void* given) {
    greg_t* registers = static_cast<ucontext_t*>(given)->uc_mcontext.gregs;
    const int length = carry_out(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
    if (!length) ::signal(signal, SIG_DFL);  // it happens again
    registers[REG_RIP] += length;
    carried_out += length > 0;
}

}  // namespace

extern "C" void carry_out_illegal() {
    struct sigaction ours = {};
    ours.sa_sigaction = illegal;
    ours.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &ours, nullptr);
}
extern "C" int64_t how_many() { return carried_out; }
extern "C" bool is_configured() { return configured; }
