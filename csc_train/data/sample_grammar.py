"""A seeded grammar that generates sample dialogues in the form of RoleCS, for the demo and the tests.

All wordings are our own; nothing is taken from the published data. Two tables alternate:

- `NEXT_ACTS` draws the customer's next act, given the supporter's last strategy.
- The strategy rule (`FIXED_STRATEGIES`, `STRATEGY_CHANCES`) draws the supporter's strategy, given that act and facts of
  the earlier turns: whether the problem was stated, the identity verified, the problem restated.

A model that reads the acts and remembers these facts reaches `accuracy_ceiling`. The previous strategy alone is a poor
predictor, because the acts vary.
"""

import contextlib
import functools
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.readers import read_dialogues, write_dialogues
from csc_train.data.strategies import CLOSURE, GREETING, STRATEGIES
from csc_train.errors import InputError

SAMPLE_SOURCE = "synthetic-sample"
ID_PREFIX = "sample-"
"""Prefix of the ids of sample dialogues."""


class ServiceProblem(NamedTuple):
    """A problem that a customer calls about."""

    topic: str
    name: str
    items: tuple[str, ...]
    cases: tuple[str, str]
    """The problem in two wordings; `{who}` is 我 or 您, so that the supporter can restate it."""
    details: tuple[tuple[str, str], ...]
    """Pairs of the supporter's question and the customer's answer."""
    facts: tuple[str, str]
    advice: tuple[str, str]
    actions: tuple[str, str]


# fmt: off
SERVICE_PROBLEMS = (
    ServiceProblem("产品咨询", "年费", ("白金信用卡", "联名信用卡", "旅行信用卡"),
            ("{who}的{item}要收{amount}元年费", "{who}的账单里多出{amount}元{item}年费"),
            (("这张卡今年刷了几次", "今年刷了{k}次"), ("这张卡是什么时候办的", "是{day}办下来的")),
            ("{item}一年刷满12次就免年费", "{item}的年费在开卡的月份收取"),
            ("先刷满次数再申请免年费", "换成不收年费的普通卡"), ("申请减免{amount}元年费", "登记{item}的年费减免")),
    ServiceProblem("产品咨询", "保修", ("智能手表", "扫地机器人", "空气净化器"),
            ("{who}的{item}用了{n}个月就坏了", "{who}买的{item}才{n}个月就不能开机"),
            (("机身上的指示灯亮不亮", "指示灯一直不亮"), ("您是从哪里买的", "在官网买的")),
            ("{item}从签收那天起保修12个月", "人为损坏不在{item}的保修范围内"),
            ("先充电两小时再开机试试", "带上发票到服务点检测"), ("登记{item}的保修单", "安排{item}上门取件")),
    ServiceProblem("产品咨询", "套餐", ("流量套餐", "家庭宽带", "亲情套餐"),
            ("{who}的{item}每月{amount}元还不够用", "{who}那个{amount}元的{item}总是不够用"),
            (("您每个月大概用多少", "大概超出{k}成"), ("家里有几个人一起用", "有{k}个人一起用")),
            ("{item}每月可以更换一次", "新的{item}从下月一日生效"),
            ("选高一档的{item}", "先加一个临时加油包"), ("更换{item}", "开通{item}的加油包")),
    ServiceProblem("营销与推广活动", "优惠券", ("满减券", "新人券", "生日券"),
            ("{who}那张{amount}元的{item}用不了", "{who}结账时{amount}元{item}没有抵扣"),
            (("券上写的到期日是哪天", "写的是{day}到期"), ("您买的是哪一类商品", "买的是生活用品")),
            ("{item}只能用在自营商品上", "{item}过期以后不能再用"),
            ("换一件自营商品再下单", "把几件商品放在一起结账"), ("补发一张{amount}元的{item}", "延长{item}的有效期")),
    ServiceProblem("营销与推广活动", "积分", ("航空积分", "会员积分", "消费积分"),
            ("{who}的{item}少了{amount}分", "{who}有{amount}分{item}没有到账"),
            (("是哪天的订单", "是{day}的订单"), ("您是在哪里兑换的", "在手机商城兑换的")),
            ("{item}在收货后{days}天内入账", "{item}每年年底清零一次"),
            ("在会员中心查看积分明细", "保留订单截图以便核对"), ("补录{amount}分{item}", "提交{item}的核查单")),
    ServiceProblem("营销与推广活动", "返现", ("开学活动", "周年活动", "邀请活动"),
            ("{who}参加{item}的{amount}元返现没收到", "{who}做完了{item}却没有{amount}元返现"),
            (("您是哪天报的名", "{day}报的名"), ("您一共完成了几项任务", "完成了{k}项任务")),
            ("{item}的返现在结束后{days}天发放", "{item}每个账户只返现一次"),
            ("先在活动页面核对任务进度", "绑定一个本人的收款账号"), ("核发{amount}元返现", "登记{item}的返现申请")),
    ServiceProblem("账户和交易管理", "转账", ("跨行转账", "手机转账", "实时转账"),
            ("{who}做的一笔{amount}元{item}没到账", "{who}用{item}转的{amount}元对方没收到"),
            (("这笔钱是哪天转的", "是{day}转的"), ("收款的是哪家银行", "是外地的一家银行")),
            ("{item}遇到节假日会顺延到账", "收款信息有误的{item}会在{days}天内退回"),
            ("跟收款人再核对一次账号", "等下一个工作日再查余额"), ("查询这笔{item}的去向", "催办这笔{amount}元的转账")),
    ServiceProblem("账户和交易管理", "重复扣款", ("水电费", "停车费", "会员费"),
            ("{who}的{item}被扣了两次{amount}元", "{who}交{item}时多扣了{amount}元"),
            (("两笔扣款隔了多久", "前后隔了{k}分钟"), ("您是用哪种方式付的", "用手机扫码付的")),
            ("重复的{item}会在{days}天内原路退回", "网络中断时{item}可能会重复记账"),
            ("保存好两笔扣款的截图", "先关闭{item}的自动扣款"), ("退回多扣的{amount}元", "提交{item}的退款申请")),
    ServiceProblem("账户和交易管理", "冻结", ("工资卡", "储蓄卡", "社保卡"),
            ("{who}的{item}被冻结了取不出{amount}元", "{who}的{item}里{amount}元突然不能用了"),
            (("最后一次用卡是哪天", "{day}用过一次"), ("您输错过几次密码", "输错过{k}次")),
            ("{item}连续输错密码就会冻结", "{item}冻结后需要本人来解除"),
            ("带证件到就近的网点办理", "在自助机上重新设置密码"), ("解除{item}的冻结", "恢复{item}的交易")),
    ServiceProblem("财务咨询与规划", "提前还款", ("房贷", "车贷", "装修贷款"),
            ("{who}想提前还{amount}万元{item}", "{who}有{amount}万元想先还掉{item}"),
            (("这笔贷款还了多少期", "已经还了{k}年"), ("您想缩短年限还是少还月供", "想缩短年限")),
            ("{item}还满一年才能提前还款", "提前还{item}要预约{days}天"),
            ("留足半年的生活费再还款", "先比较利息再定金额"), ("预约{amount}万元的提前还款", "试算{item}的剩余利息")),
    ServiceProblem("财务咨询与规划", "赎回", ("稳健理财", "养老基金", "定期存款"),
            ("{who}买的{amount}万元{item}想取出来", "{who}想把{amount}万元{item}取出来"),
            (("您打算用在什么地方", "打算给孩子交学费"), ("您是什么时候买的", "{day}买的")),
            ("{item}没有到期会损失一部分收益", "{item}赎回后{days}天到账"),
            ("只取一部分，其余继续持有", "等到期以后再全部取出"), ("提交{item}的赎回", "预约取出{amount}万元")),
    ServiceProblem("财务咨询与规划", "分期", ("账单分期", "现金分期", "购物分期"),
            ("{who}的{item}每期手续费要{amount}元", "{who}办的{item}一期就收{amount}元手续费"),
            (("您一共分了多少期", "一共分了{k}期"), ("您每个月几号还款", "每月{k}号还款")),
            ("{item}的手续费按本金每期收取", "{item}提前结清不再收后面的手续费"),
            ("有余钱时提前结清", "下次选期数短一些的方案"), ("结清{item}", "减免{amount}元手续费")),
    ServiceProblem("风险管理与安全", "盗刷", ("信用卡", "银行卡", "电子钱包"),
            ("{who}的{item}被人刷走了{amount}元", "{who}没用过{item}却少了{amount}元"),
            (("这笔消费是在哪里发生的", "显示是在外地商场"), ("您的密码告诉过别人吗", "没有告诉过别人")),
            ("{item}被盗刷可以在{days}天内申诉", "挂失以后{item}的损失由我们核查"),
            ("马上修改支付密码", "到派出所报案并留好回执"), ("冻结{item}", "提交{amount}元的盗刷申诉")),
    ServiceProblem("风险管理与安全", "诈骗", ("中奖短信", "退款电话", "贷款短信"),
            ("{who}收到{item}要先交{amount}元", "有个{item}让{who}先交{amount}元"),
            (("对方让您点链接了吗", "点开看了{k}分钟"), ("对方的号码是多少", "号码是[手机号码]")),
            ("我们不会用{item}要求您转账", "{item}里的链接会盗取您的资料"),
            ("先删掉对方发来的链接", "把对方的号码拉进黑名单"), ("举报这条{item}", "打开账户的转账保护")),
    ServiceProblem("风险管理与安全", "异地登录", ("网银账户", "手机银行", "交易账户"),
            ("{who}的{item}在外地登录了{n}次", "{who}收到{item}的{n}条异地登录提醒"),
            (("您最近出过差吗", "最近没有出过门"), ("提醒是几点发来的", "晚上{k}点发来的")),
            ("{item}换设备登录时会发提醒", "{item}的登录记录保存{days}天"),
            ("退出所有设备并修改密码", "打开登录时的二次验证"), ("下线陌生的登录设备", "锁定{item}")),
    ServiceProblem("投诉与纠纷解决", "物流", ("生鲜包裹", "家电订单", "图书订单"),
            ("{who}的{item}晚了{n}天还没送到", "{who}等了{n}天{item}还在路上"),
            (("物流停在哪一站", "停在中转站"), ("您是哪天下的单", "{day}下的单")),
            ("{item}超时送达可以申请补偿", "天气不好时{item}会晚到"),
            ("先留意快递员的来电", "改成到附近的站点自提"), ("联系快递加急送{item}", "登记{item}的超时补偿")),
    ServiceProblem("投诉与纠纷解决", "退货", ("玻璃餐具", "实木书桌", "台灯"),
            ("{who}收到的{item}是破的，花了{amount}元", "{who}花{amount}元买的{item}有裂痕"),
            (("外包装有没有压坏", "外包装压扁了一角"), ("您是哪天签收的", "{day}签收的")),
            ("破损的{item}{days}天内可以退换", "{item}退货的运费由商家承担"),
            ("给破损的地方拍几张照片", "把原来的包装盒留好"), ("办理{amount}元退款", "寄出一件新的{item}")),
    ServiceProblem("投诉与纠纷解决", "爽约", ("空调安装", "家电维修", "保洁服务"),
            ("{who}约的{item}师傅{n}次都没来", "{who}等了{n}次{item}的师傅都没见到"),
            (("您约的是哪一天", "约的是{day}"), ("师傅给您打过电话吗", "一个电话也没打")),
            ("{item}爽约可以获得{amount}元补偿", "{item}改时间要提前一天通知客户"),
            ("另选一个方便的上门时间", "换一家近一点的服务站"), ("重新预约{item}", "上报这次{item}的爽约")),
    ServiceProblem("技术支持与在线服务", "登录", ("手机客户端", "网上商城", "会员网站"),
            ("{who}登录{item}失败了{n}次", "{who}试了{n}次都登不上{item}"),
            (("页面上显示什么文字", "显示网络异常"), ("您用的是哪种手机", "用的是三年前的旧手机")),
            ("{item}每晚零点到一点要维护", "{item}的旧版本已经停用"),
            ("把{item}更新到最新版本", "清除缓存后重新启动"), ("重置{item}的登录状态", "解锁{item}的账号")),
    ServiceProblem("技术支持与在线服务", "验证码", ("注册验证码", "支付验证码", "登录验证码"),
            ("{who}试了{n}次也没收到{item}", "{who}点了{n}次都没有{item}"),
            (("手机信号有几格", "信号是满格的"), ("您装过拦截软件吗", "装过一个拦截软件")),
            ("{item}一天最多发送十次", "{item}五分钟内有效"),
            ("检查短信的拦截名单", "改用语音方式接收"), ("重新发送{item}", "解除{item}的发送限制")),
    ServiceProblem("技术支持与在线服务", "闪退", ("支付页面", "直播页面", "发票页面"),
            ("{who}打开{item}就闪退，试了{n}次", "{who}试了{n}次，{item}都自己关掉"),
            (("手机还剩多少空间", "只剩{k}成空间"), ("是哪天开始这样的", "{day}开始的")),
            ("{item}在旧系统上会不稳定", "{item}的修复版本{days}天内上线"),
            ("腾出一些手机空间", "换用电脑打开{item}"), ("上报{item}的闪退", "推送{item}的修复包")),
)

FEELINGS = {
    # mood: wordings of the customer, wordings of the supporter's answer
    "平静": (("说实话有点郁闷", "心里多少有些烦", "弄得我挺为难的"),
           ("{item}的事给您添麻烦了，抱歉。", "让您为难了，我们一起来处理{item}的事。")),
    "着急": (("我真的很着急", "急得我睡不着", "这事拖不起了"),
           ("我明白您很着急，{item}的事我会陪您跟到底。", "您别急，{item}的事我一定放在最前面。")),
    "不满": (("我很不满意", "你们太不负责了", "真让人生气"),
           ("非常抱歉，{item}的事让您生气了。", "您的不满我完全理解，{item}的事是我们没做好。")),
    "担心": (("我心里很担心", "越想越不放心", "我有点害怕"),
           ("您的担心我很理解，{item}的事请您放心。", "换作是我也会担心{item}，请您先放宽心。")),
    "失望": (("我对你们很失望", "真叫人寒心", "枉我这么信任你们"),
           ("辜负了您的信任，{item}的事我向您道歉。", "听您这么说我很难过，{item}的事对不起您。")),
}

CUSTOMER_WORDINGS = {
    # customer act: wordings
    "problem": ("{case}，麻烦您看看。", "是这样的，{case}。", "{case}，想问一下。", "我遇到的情况是{case}。"),
    "vague": ("我想问问{item}的事。", "{item}好像不太对。", "{item}有点问题。", "我是为{item}打来的。"),
    "account": ("请查一下{item}的登记情况。", "想看看我的{item}记录。", "帮我调一下{item}的资料。"),
    "smalltalk": ("今天天气真热啊。", "您的声音真好听。", "你们这么晚还上班啊？", "排队的音乐还挺好听的。",
                  "您是真人还是机器人啊？", "哎，孩子在旁边吵，不好意思。"),
    "hold": ("稍等，我找一下。", "等一下，有人敲门。", "（沉默）", "喂，听得到吗？", "您等等，我拿支笔。"),
    "identity": ("我姓{surname}，手机号是[手机号码]。", "手机号[手机号码]，证件尾号{tail}。",
                 "我叫[姓名]，尾号{tail}。", "好的，证件号是[身份证号]，我姓{surname}。"),
    "question_identity": ("为什么要问我的手机号？", "报证件号安全吗？", "一定要核对身份吗？", "我的资料会不会泄露？"),
    "confirm": ("对，就是这样。", "没错，是这个情况。", "是的，您说得对。", "嗯，您理解得很准。"),
    "correct": ("不对，不全是这样。", "不是这个意思，还差一点。", "您说得不太对。", "没错是没错，可您漏了一点。"),
    "recheck": ("您听明白我的问题了吗？", "您把我的情况说一遍吧。", "我怕您没听懂，您说说看？"),
    "detail": ("{answer}。", "嗯，{answer}。", "{answer}，大概是这样。", "我想想，{answer}。"),
    "why": ("为什么会这样？", "{item}怎么会这样？", "这是什么规定？", "{item}的规则是怎么定的？", "是什么原因呢？"),
    "how": ("那我该怎么办？", "{item}要怎么处理才好？", "有什么好办法吗？", "您看怎么做合适？", "我自己能做点什么？"),
    "doit": ("请直接帮我办了吧。", "能帮我处理{item}吗？", "您现在就给我弄好吧。", "麻烦您替我办一下。"),
    "agree": ("行，就按您说的办。", "可以，那就这么办吧。", "好，我同意这样处理。", "没问题，您办吧。"),
    "wait": ("好，我等着您办。", "行，您慢慢弄，我不挂。", "办到哪一步了？", "好了没有，进度怎么样？"),
    "fails": ("我看了，还是不行。", "还是没好，跟刚才一样。", "怎么还是老样子。", "办了也没有变化啊。"),
    "done": ("看到了，已经好了。", "可以了，问题解决了。", "好了，现在没问题了。", "收到通知了，办好了。"),
    "await": ("好，那我等你们的消息。", "行，有结果请通知我。", "可以，那我过几天再看。", "那就先登记，我等通知。"),
    "self": ("明白了，我自己去办。", "好，那我回头自己试试。", "知道了，我先自己处理。", "行，我按步骤自己来。"),
    "good": ("很满意，给您满分。", "您办得很好，我满意。", "服务不错，打五分。", "挺好的，没什么不满意。"),
    "bad": ("不太满意，只能打两分。", "一般吧，等得太久了。", "服务不怎么样，打三分。", "说不上好，太慢了。"),
    "interest": ("以后{item}再出问题怎么办？", "下次还能找您吗？", "你们还有什么别的服务？", "以后怎么联系你们？"),
    "join": ("听着不错，要登记吗？", "那个要收费吗？", "是不是什么时候都可以？", "需要什么条件吗？"),
    "bye": ("没有了，谢谢，再见。", "不用了，就这样吧。", "暂时不用，谢谢您。", "好的，没别的事了。", "行，那我挂了。"),
}

SUPPORTER_WORDINGS = {
    # strategy, or (strategy, customer act) if the wording depends on the act: the supporter's wordings
    1: ("您好，我是{badge}号客服，很高兴为您服务。", "您好，欢迎来电，{badge}号客服为您服务。",
        "{hello}，这里是客户服务中心，请问有什么可以帮您？", "{hello}，我是客服{badge}，请讲。"),
    2: ("请您提供一下姓名和手机号。", "查{item}要先核对身份，请报一下证件尾号。",
        "办理前要核对身份，请说一下手机号。", "请问您的姓名和证件号是多少？"),
    3: ("您是说{case}，对吗？", "我确认一下，{case}，是吗？", "也就是说，{case}。", "我重复一遍：{case}。"),
    4: ("请问{question}？", "想再了解一下，{question}？", "麻烦您告诉我，{question}？"),
    (4, "vague"): ("请问{item}具体遇到了什么情况？", "您能说说{item}怎么了吗？", "请问您想了解{item}的哪方面？"),
    (4, "identity"): ("核对好了，请问{item}出了什么问题？", "身份没问题，{item}的情况请您说一下？"),
    (4, "correct"): ("抱歉，我漏听了，{question}？", "那请您补充一下，{question}？"),
    (4, "fails"): ("还没好吗？请问{question}？", "我再排查一下，{question}？"),
    (5, "bad"): ("没能让您满意，我很抱歉。", "{item}的事让您久等了，真对不起。"),
    6: ("建议您{advice}。", "您可以{advice}。", "我的建议是{advice}。", "最稳妥的办法是{advice}。"),
    7: ("是这样，{fact}。", "跟您说明一下，{fact}。", "目前的情况是{fact}。", "{fact}，请您了解一下。"),
    (7, "question_identity"): ("核对身份是为了保护您，资料不会外传。", "按规定要先核对身份，您的资料会保密。"),
    (7, "join"): ("这些都是免费的，全天都可以用。", "不收费用，您本人联系我们就可以。"),
    8: ("好的，我马上为您{action}。", "我现在就为您{action}，请稍等。", "这就给您{action}。", "正在为您{action}。"),
    (8, "wait"): ("已经为您{action}，系统处理中。", "进度过半了，正在{action}。", "刚提交好，已为您{action}。"),
    9: ("请给这次处理{item}的服务打个分。", "请问您对处理结果满意吗？", "方便的话请评价一下我的服务。"),
    10: ("今后再有{item}的问题，随时找我们。", "以后有需要，随时拨打客服热线。", "您也可以关注我们的会员服务。",
         "下月有老客户回馈，欢迎您来参加。"),
    11: ("感谢您的来电，再见。", "谢谢您的支持，祝您愉快，再见。", "感谢您的耐心，祝您一切顺利。", "谢谢您，再见。"),
    (12, "smalltalk"): ("哈哈，您真有意思，我们接着说吧。", "谢谢您关心，我一直在线。", "没关系，您慢慢来。"),
    (12, "hold"): ("我在听，您说。", "好的，不着急，我在线等您。", "我一直都在，您请讲。"),
}

FIXED_STRATEGIES = {
    # customer act: the strategy that always answers it
    "vague": 4, "account": 2, "smalltalk": 12, "hold": 12, "upset": 5, "question_identity": 7, "correct": 4,
    "recheck": 3, "why": 7, "wait": 8, "bad": 5, "interest": 10, "join": 7, "bye": 11,
}
STRATEGY_CHANCES = {
    # other acts: (fact, chances of the strategies if it holds), tried in order; the empty fact always holds
    "problem": (("verified", {3: 1.0}), ("", {2: 1.0})),
    "doit": (("verified", {8: 1.0}), ("", {2: 1.0})),
    "agree": (("verified", {8: 1.0}), ("", {2: 1.0})),
    "identity": (("stated", {3: 0.75, 6: 0.25}), ("", {4: 1.0})),
    "detail": (("restated", {6: 0.7, 7: 0.3}), ("", {3: 1.0})),
    "confirm": (("", {7: 0.7, 6: 0.3}),),
    "how": (("", {6: 0.75, 4: 0.25}),),
    "fails": (("", {4: 0.75, 6: 0.25}),),
    "done": (("", {9: 0.7, 10: 0.3}),),
    "await": (("", {10: 0.7, 9: 0.3}),),
    "self": (("", {9: 0.7, 10: 0.3}),),
    "good": (("", {10: 0.7, 11: 0.3}),),
}

OPENING, ASIDE, MATTER = "!stated", "!settled !late", "stated !settled"
PRECONDITIONS = {
    # customer act: its preconditions, facts that must hold (with "!": must not hold)
    "problem": OPENING, "vague": OPENING, "account": "!stated !asked",
    "smalltalk": ASIDE, "hold": ASIDE, "upset": ASIDE,
    "identity": "asked !verified", "question_identity": "!verified !late",
    "confirm": MATTER, "correct": MATTER, "recheck": MATTER + " !late", "detail": MATTER + " questioned",
    "why": MATTER + " !late", "how": MATTER, "doit": MATTER, "agree": MATTER, "wait": MATTER, "fails": MATTER,
    "done": "solved ready !settled", "await": "solved ready !settled", "self": "verified ready !settled",
    "good": "settled", "bad": "settled", "interest": "settled", "join": "settled", "bye": "settled",
}

NEXT_ACTS = {
    # the supporter's last strategy: weights of the customer's next acts, of those whose preconditions are met
    1: {"problem": 6, "account": 3, "vague": 4, "upset": 4, "smalltalk": 2, "hold": 1},
    2: {"identity": 14, "question_identity": 4, "hold": 3, "upset": 2},
    3: {"confirm": 8, "correct": 4, "how": 2, "upset": 3, "doit": 3},
    4: {"detail": 12, "problem": 12, "hold": 3, "upset": 4, "why": 1, "doit": 1},
    5: {"problem": 8, "why": 4, "how": 3, "doit": 4, "recheck": 2, "vague": 2, "bye": 6, "interest": 2},
    6: {"agree": 9, "self": 6, "why": 3, "how": 2, "upset": 2, "recheck": 1, "hold": 1},
    7: {"how": 7, "doit": 4, "upset": 3, "recheck": 1, "smalltalk": 2, "bye": 4, "interest": 2},
    8: {"done": 9, "await": 9, "wait": 4, "fails": 5, "why": 1, "upset": 2, "smalltalk": 1},
    9: {"good": 8, "bad": 3, "bye": 3, "interest": 1},
    10: {"bye": 8, "interest": 2, "join": 3},
    12: {"problem": 5, "upset": 2, "why": 3, "how": 3, "doit": 3, "recheck": 2, "detail": 5, "vague": 2},
}

# Words that may precede an act. They belong to other acts, so that no single word identifies the act.
OPENERS = ("好的，", "谢谢，", "我不着急，", "可以了，", "对了，")
OPENED = ("why", "how", "doit", "recheck")

GENERAL_DETAILS = (("您之前联系过我们吗", "之前没有联系过"), ("这种情况是第几次了", "是第{k}次了"))

SLOT_VALUES = {
    "amount": ("30", "50", "60", "80", "90", "120", "150", "180", "200", "260", "300", "500"),
    "n": tuple("23456789"),
    "k": tuple("23456789"),
    "day": ("昨天", "前天", "上周五", "上周末", "月初", "上个月", "三月六日", "五月八日", "六月一日", "九月九日"),
    "days": ("3", "5", "7", "10", "15"),
    "hello": ("您好", "早上好", "下午好", "晚上好"),
    "surname": tuple("王李张刘陈杨黄赵周吴徐孙马朱胡林"),
}
OUTCOMES = {"done": "已解决", "await": "待跟进", "self": "自行处理"}
# fmt: on

# Supporter turns after which a dialogue may end, and after which the customer hurries to the end: long enough for every
# stage, short enough for a demo.
MIN_TURNS, HURRY_AFTER = 6, 8
HURRY_WEIGHTS = {"problem": 12, "identity": 12, "doit": 6, "done": 12, "await": 12, "bye": 6}


def generate_sample(count: int, seed: int) -> list[Dialogue]:
    """Generate `count` dialogues of about 11 supporter turns.

    Dialogue `i` depends only on `seed` and `i`, so a smaller sample is a prefix of a larger one. Ids read
    `sample-{seed}-{index:05d}`; `extra` holds the texts `topic`, `problem`, `mood` and `outcome`.

    Raises:
        InputError: `count` is less than 1.
    """
    if count < 1:
        raise InputError(f"sample of {count} dialogues: must be at least 1")
    return [_write_dialogue(seed, index) for index in range(count)]


def ensure_sample(path: str | os.PathLike, count: int, seed: int) -> bool:
    """Write the sample to `path` (`.jsonl` or `.parquet`) unless the file already holds exactly that sample.

    Returns:
        True if the file was written (replacing another sample), False if it was kept.

    Raises:
        InputError: `count` is less than 1, the suffix is another, the file holds anything but a sample (it is kept), or
            it cannot be written.
    """
    dialogues = generate_sample(count, seed)
    # The suffix comes first, because other paths could be read as data sets of the hub.
    if Path(path).suffix in (".jsonl", ".parquet") and Path(path).is_file():
        kept = []
        with contextlib.suppress(InputError):
            kept = read_dialogues(path, strict=True)
        # Checked by id as well: the mock backend uses the same grammar, and its dialogues must not be overwritten.
        if not kept or not all(
            dialogue.id.startswith(ID_PREFIX) and dialogue.source == SAMPLE_SOURCE for dialogue in kept
        ):
            raise InputError(
                f"{path}: exists and is no sample: for your own dialogues give data=files data.train.path={path} "
                "data.sample_dialogues=null"
            )
        if [dialogue.row() for dialogue in kept] == [dialogue.row() for dialogue in dialogues]:
            return False
    write_dialogues(path, dialogues)
    return True


def accuracy_ceiling(dialogues: Iterable[Dialogue]) -> float:
    """The strategy accuracy of an oracle on these dialogues, in percent of all supporter turns.

    The oracle knows the strategy rule and the earlier turns, and always predicts the most probable strategy. On many
    dialogues no model can reach more. Works on dialogues from a file as well.

    Raises:
        InputError: a dialogue is not from this grammar, or there are none.
    """
    hits = [actual == max(chances, key=chances.get) for d in dialogues for actual, chances in _replay(d)]
    if not hits:
        raise InputError("accuracy ceiling: there are no dialogues")
    return 100.0 * sum(hits) / len(hits)


def _facts(acts: list[str], strategies: list[int]) -> set[str]:
    """The facts that `PRECONDITIONS` and `STRATEGY_CHANCES` name, from the acts and strategies so far."""
    question = max((index for index, strategy in enumerate(strategies) if strategy == 4), default=0)
    facts = {
        "stated": "problem" in acts,
        "verified": "identity" in acts,
        "restated": 3 in strategies,
        "asked": 2 in strategies,
        "questioned": 4 in strategies and {"detail", "problem"}.isdisjoint(acts[question:]),
        "solved": 8 in strategies,
        "settled": bool(OUTCOMES.keys() & {*acts}),
        "ready": len(strategies) >= MIN_TURNS,
        "late": len(strategies) >= HURRY_AFTER,
    }
    return {fact for fact, holds in facts.items() if holds}


def _chances(act: str, facts: set[str]) -> dict[int, float]:
    """The chance of each strategy as the answer to `act`."""
    if act in FIXED_STRATEGIES:
        return {FIXED_STRATEGIES[act]: 1.0}
    return next(chances for fact, chances in STRATEGY_CHANCES[act] if not fact or fact in facts)


def _write_dialogue(seed: int, index: int) -> Dialogue:
    # A string seed is the same on every platform and does not correlate neighbouring dialogues.
    rng = random.Random(f"{seed}:{index}")
    problem, mood = rng.choice(SERVICE_PROBLEMS), rng.choice(list(FEELINGS))
    acts, turns = write_turns(rng, problem, mood)
    outcome = next(OUTCOMES[act] for act in acts if act in OUTCOMES)
    extra = {"topic": problem.topic, "problem": problem.name, "mood": mood, "outcome": outcome}
    return Dialogue(f"{ID_PREFIX}{seed}-{index:05d}", tuple(turns), SAMPLE_SOURCE, extra)


def write_turns(rng: random.Random, problem: ServiceProblem, mood: str) -> tuple[list[str], list[Turn]]:
    """Draw a conversation about `problem` with a customer in `mood` (a key of `FEELINGS`).

    Returns:
        The customer's acts (see `CUSTOMER_WORDINGS`) in order, and the turns of both speakers.
    """
    writer = _Writer(rng, problem, mood)
    acts, strategies, turns = [], [GREETING.number], []
    while True:
        text = writer.reply(strategies[-1], acts[-1] if acts else "")
        turns.append(Turn(Speaker.SUPPORTER, text, STRATEGIES[strategies[-1] - 1]))
        if strategies[-1] == CLOSURE.number:
            return acts, turns
        acts.append(_next_act(rng, acts, strategies, mood))
        facts = _facts(acts, strategies)
        turns.append(Turn(Speaker.CUSTOMER, writer.utterance(acts[-1], facts)))
        strategies.append(_draw(rng, _chances(acts[-1], facts)))


def _next_act(rng: random.Random, acts: list[str], strategies: list[int], mood: str) -> str:
    facts = _facts(acts, strategies)
    # A request for the identity stays open until it is answered.
    weights = {"identity": 6} | NEXT_ACTS[strategies[-1]] | (HURRY_WEIGHTS if "late" in facts else {})
    if "upset" in weights and mood == "平静":
        weights["upset"] /= 2

    def possible(act: str) -> bool:
        needs_met = all((need.lstrip("!") in facts) != need.startswith("!") for need in PRECONDITIONS[act].split())
        twice = strategies[-1] if strategies[-2:-1] == strategies[-1:] else None
        return needs_met and twice not in _chances(act, facts)

    return _draw(rng, {act: weight for act, weight in weights.items() if possible(act)})


def _draw(rng: random.Random, weights: Mapping) -> str | int:
    return rng.choices(list(weights), list(weights.values()))[0]


class _Writer:
    """Renders the acts and strategies of one dialogue as text; wordings repeat only after all were used."""

    def __init__(self, rng: random.Random, problem: ServiceProblem, mood: str):
        self.rng, self.problem, self.mood = rng, problem, mood
        self.unused: dict[tuple, list] = {}
        self.slots = {slot: rng.choice(values) for slot, values in SLOT_VALUES.items()}
        self.slots |= {"item": rng.choice(problem.items), "badge": f"{rng.randrange(100, 1000)}"}
        self.slots["tail"] = f"{rng.randrange(10_000):04d}"
        self._ask()

    def reply(self, strategy: int, act: str) -> str:
        if strategy == 4:
            self._ask()
        if act == "upset":
            return self._fill(FEELINGS[self.mood][1], who="您")
        return self._fill(SUPPORTER_WORDINGS.get((strategy, act)) or SUPPORTER_WORDINGS[strategy], who="您")

    def utterance(self, act: str, facts: set[str]) -> str:
        if act == "upset":
            feeling = self._pick(FEELINGS[self.mood][0])
            # Before the problem is stated, the product is named with the feeling, so that the topic is clear.
            other = "vague" if "stated" not in facts else self.rng.choice(("why", "how", "doit", ""))
            if not other:
                return f"{feeling}。"
            text = self._fill(CUSTOMER_WORDINGS[other], who="我")
            return f"{feeling}，{text}" if self.rng.random() < 0.5 else f"{text}{feeling}。"
        opener = self.rng.choice(OPENERS) if act in OPENED and self.rng.random() < 0.4 else ""
        return opener + self._fill(CUSTOMER_WORDINGS[act], who="我")

    def _ask(self) -> None:
        self.slots["question"], self.slots["answer"] = self._pick(self.problem.details + GENERAL_DETAILS)

    def _fill(self, wordings: tuple[str, ...], who: str) -> str:
        template = self._pick(wordings)
        clauses = {"case": "cases", "fact": "facts", "advice": "advice", "action": "actions"}
        used = [slot for slot in clauses if f"{{{slot}}}" in template]
        inner = {slot: self._pick(getattr(self.problem, clauses[slot])) for slot in used}
        slots = self.slots | {"who": who} | inner
        # Twice, because a clause has slots itself.
        return template.format_map(slots).format_map(slots)

    def _pick(self, choices: tuple):
        unused = self.unused.setdefault(choices, [])
        if not unused:
            unused += self.rng.sample(choices, len(choices))
        return unused.pop()


def _replay(dialogue: Dialogue) -> Iterator[tuple[int, dict[int, float]]]:
    """For each supporter turn: its strategy's number, and the chance of each strategy by the strategy rule."""
    acts, strategies = [], []
    for number, turn in enumerate(dialogue.turns, start=1):
        place = f"dialogue {dialogue.id}, turn {number}"
        if turn.speaker is Speaker.CUSTOMER:
            matches = _matching_acts(turn.text)
            if len(matches) != 1:
                raise InputError(f"{place}: not an utterance of the sample grammar")
            acts += matches
        else:
            chances = _chances(acts[-1], _facts(acts, strategies)) if acts else {GREETING.number: 1.0}
            if turn.strategy.number not in chances:
                raise InputError(f"{place}: not a strategy that the sample grammar allows here")
            yield turn.strategy.number, chances
            strategies.append(turn.strategy.number)


def _matching_acts(text: str) -> list[str]:
    """The acts that `text` may express: exactly one for a customer's utterance of this grammar."""
    if any(feeling in text for said, _ in FEELINGS.values() for feeling in said):
        return ["upset"]
    return [act for act, pattern in _patterns().items() if pattern.fullmatch(text)]


@functools.cache
def _patterns() -> dict[str, re.Pattern]:
    """For each act except `upset`, a pattern of its wordings with every filling of their slots."""
    values = {slot: _any(map(re.escape, choices)) for slot, choices in SLOT_VALUES.items()}
    values |= {"who": "[我您]", "tail": "[0-9]{4}", "item": _any(i for p in SERVICE_PROBLEMS for i in p.items)}

    def expand(template: str) -> str:
        parts = re.split(r"\{(\w+)\}", template)
        return "".join(values[part] if index % 2 else re.escape(part) for index, part in enumerate(parts))

    details = [pair for p in SERVICE_PROBLEMS for pair in p.details] + list(GENERAL_DETAILS)
    values["case"] = _any(expand(case) for p in SERVICE_PROBLEMS for case in p.cases)
    values["answer"] = _any(expand(answer) for _, answer in details)
    openers = {act: _any(OPENERS) + "?" for act in OPENED}
    return {
        act: re.compile(openers.get(act, "") + _any(map(expand, texts))) for act, texts in CUSTOMER_WORDINGS.items()
    }


def _any(expressions: Iterable[str]) -> str:
    return f"(?:{'|'.join(expressions)})"
